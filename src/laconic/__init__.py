"""laconic: train networks that say the same in fewer parameters."""

from ._version import __version__
from .attention import unfuse
from .budget import Budget
from .checkpoint import load, save
from .compaction import compress
from .compressor import Compressor
from .errors import (
    ArchitectureMismatchError,
    CheckpointError,
    CheckpointNotFoundError,
    DataNotFoundError,
    DecompositionError,
    InfeasibleBudgetError,
    InvalidTypeError,
    InvalidValueError,
    LaconicError,
    MissingExtraError,
    NonFiniteError,
    NothingToCompressError,
    OptimizerError,
    PatternError,
    RecipeError,
    SurgeryError,
    UnsupportedOptimizerError,
)
from .measure import Latency, Profile, profile
from .penalties import L1, Hoyer, KeepEnergy, KeepLargest, LogSum, Penalty
from .report import CompactReport
from .running import RunCheckpoints
from .schedule import Schedule
from .search import SearchResult, Trial, smallest
from .solvers import SVTResult, spectral_prox, svt
from .structures import Channels, Entries, LowRank, sparse_group_lasso, structured_sparsity

__all__ = [
    "L1",
    "ArchitectureMismatchError",
    "Budget",
    "Channels",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CompactReport",
    "Compressor",
    "DataNotFoundError",
    "DecompositionError",
    "Entries",
    "Hoyer",
    "InfeasibleBudgetError",
    "InvalidTypeError",
    "InvalidValueError",
    "KeepEnergy",
    "KeepLargest",
    "LaconicError",
    "Latency",
    "LogSum",
    "LowRank",
    "MissingExtraError",
    "NonFiniteError",
    "NothingToCompressError",
    "OptimizerError",
    "PatternError",
    "Penalty",
    "Profile",
    "RecipeError",
    "RunCheckpoints",
    "SVTResult",
    "Schedule",
    "SearchResult",
    "SurgeryError",
    "Trial",
    "UnsupportedOptimizerError",
    "__version__",
    "compress",
    "load",
    "profile",
    "save",
    "smallest",
    "sparse_group_lasso",
    "spectral_prox",
    "structured_sparsity",
    "svt",
    "unfuse",
]
