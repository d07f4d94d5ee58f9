"""Hugging Face: a cut model as an ordinary one of another configuration, which `from_pretrained` and all that reads such models can load."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..cuts import largest_difference
from ..distributed import bare
from ..errors import InvalidTypeError, InvalidValueError, first_line, missing_extra
from ..graph.labels import outputs
from ..measure import check_inputs
from ..surgery.record import find_cuts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
else:
    try:
        from transformers import PretrainedConfig, PreTrainedModel
    except ImportError as error:
        raise missing_extra("transformers[torch]", "transformers", "laconic.integrations.pretrained") from error

# How configurations call widths, and numbers of heads.
WIDTHS: tuple[str, ...] = (
    "hidden_size",
    "n_embd",
    "d_model",
    "dim",
    "embed_dim",
    "embedding_size",
    "word_embed_proj_dim",
    "pooler_hidden_size",
)
WIDTHS += (
    "intermediate_size",
    "n_inner",
    "d_ff",
    "hidden_dim",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "decoder_hidden_size",
    "decoder_intermediate_size",
)
HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "num_key_value_heads",
)
TRIED = 256  # combinations of what each may be
SAME = 1e-6  # of the largest output: no other configuration would be nearer
TOLERANCE = 1e-3  # of the largest output: the same sums in another order

Shapes = dict[str, torch.Size]
Entry = tuple[str, str, Any]  # of which part of a configuration ("" is all of it), the name there, and the value


def reconfigured(model: PreTrainedModel, example_inputs: Any) -> PreTrainedModel:
    """An ordinary model of the same class whose configuration has the widths and numbers of heads that are left, with the same weights.

    `reconfigured(model, inputs).save_pretrained(directory)` writes what `from_pretrained(directory)` reads, without laconic. The sizes are those that
    give every tensor the shape that it has, and both models are run on `example_inputs` and compared; `model` stays as it is. A configuration has one
    number for all blocks, so this is for widths that shrank evenly (`Channels(even=True)`, the default for transformers).

    Args:
        example_inputs: as for `laconic.Compressor`.

    Raises:
        InvalidTypeError: not a model of transformers. InvalidValueError: no configuration of its class says what it is: a layer that became
            two, blocks of different widths, heads that are together not as wide as the stream where the class has no `head_dim`.
    """
    given = bare(model)
    if not isinstance(given, PreTrainedModel):
        raise InvalidTypeError(f"{type(given).__name__} is no model of transformers: laconic.save and laconic.load are for all others")
    model = given
    if cuts := find_cuts(model):
        raise InvalidValueError(
            f"{cuts[0].names[0]} has become two layers, which no configuration says: keep the model by laconic.save, or train it with Channels(even=True), without LowRank"
        )
    inputs = check_inputs(example_inputs, model)
    wanted = shapes(model)
    try:
        dense = shapes(skeleton(model, model.config))
    except Exception as error:
        raise InvalidValueError(
            f"{type(model).__name__} cannot be built from its configuration alone ({type(error).__name__}: {first_line(error)}): laconic.save and laconic.load keep it"
        ) from None
    nearest: tuple[float, str] = (math.inf, "")
    before = outputs(model, inputs)
    least, best = math.inf, None  # fewer heads of more places have the same shapes, and in a young model nearly the same outputs
    for changes in itertools.islice(candidates(model.config, changed_sizes(dense, wanted)), TRIED):
        config = with_changes(model.config, changes)
        try:
            found = shapes(skeleton(model, config))
        except Exception as error:  # the class itself says that these sizes do not go together
            nearest = min(nearest, (sys.maxsize, first_line(error)))
            continue
        if wrong := [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]:
            here, there = (list(x.get(wrong[0], ())) for x in (wanted, found))
            nearest = min(nearest, (len(wrong), f"with {described(changes)} {wrong[0]} would be {there}, and is {here}"))
            continue
        try:
            type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))  # as from a file, when it is checked
        except Exception as error:
            nearest = min(nearest, (0, f"{described(changes)}: {' '.join(str(error).split())}"))
            continue
        fresh = filled(model, config)
        off, notes = largest_difference(before, outputs(fresh, inputs))
        if off is None:
            raise InvalidValueError(f"example_inputs: {'; '.join(notes)}")
        if off < least:
            least, best = off, fresh
        if off <= SAME * max(float(x.abs().max()) for x in before):
            return fresh
        nearest = min(nearest, (0, f"with {described(changes)} its outputs would be off by {off:.2g}"))
    if best is not None and least <= TOLERANCE * max(float(x.abs().max()) for x in before):
        return best
    raise InvalidValueError(f"no {type(model.config).__name__} describes this model: {nearest[1]}; laconic.save and laconic.load keep it")


def shapes(model: nn.Module) -> Shapes:
    return {name: x.shape for name, x in model.state_dict().items()}


def skeleton(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Of the same class, without numbers."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def changed_sizes(dense: Shapes, now: Shapes) -> dict[int, set[int]]:
    """What has become of axes of a size, over all tensors."""
    sizes: dict[int, set[int]] = defaultdict(set)
    for name, shape in dense.items():
        for old, new in zip(shape, now.get(name, ()), strict=False):
            sizes[old].add(new)
    return sizes


def candidates(config: PretrainedConfig, sizes: Mapping[int, set[int]]) -> Iterator[list[Entry]]:
    """What the entries of a configuration may have become, the most likely first; then the same with the size of a head said."""
    entries: list[list[Entry]] = []
    parts = {"": config} | {name: part for name, part in vars(config).items() if isinstance(part, PretrainedConfig)}
    heads: list[list[Entry]] = []
    for at, part in parts.items():
        said = part.to_dict()
        for name in WIDTHS:
            if isinstance(said.get(name), int):
                entries.append([(at, name, new) for new in sorted(sizes.get(said[name], set()) | {said[name]})])
            elif name in said and said[name] is None:  # n_inner: four times the width, until it is said
                entries.append([(at, name, None)] + [(at, name, new) for old, news in sizes.items() for new in sorted(news) if new != old])
        for name in HEADS:
            if isinstance(count := said.get(name), int):
                of_head = {old // count: news for old, news in sizes.items() if old % count == 0}
                left = {new // size for size, news in of_head.items() for new in news if new % size == 0 and new // size <= count}
                entries.append([(at, name, new) for new in sorted(left | {count})])
        width, count = (getattr(part, name, None) for name in ("hidden_size", "num_attention_heads"))
        if isinstance(width, int) and isinstance(count, int) and said.get("head_dim") is None:
            left = {new // count for new in sizes.get(width, ()) if new % count == 0} | {width // count}
            heads.append([(at, "head_dim", size) for size in sorted(left)])
    for extra in ([], heads) if heads else ([],):
        for chosen in itertools.product(*entries, *extra):
            yield list(chosen)


def with_changes(config: PretrainedConfig, changes: list[Entry]) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    for at, name, value in changes:
        setattr(getattr(changed, at) if at else changed, name, value)
    return changed


def described(changes: list[Entry]) -> str:
    return ", ".join(f"{f'{at}.' if at else ''}{name} = {value}" for at, name, value in changes)


def filled(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """With the numbers of the model, also those that are not saved, each in its precision and place, what is tied tied, what is frozen frozen."""
    with torch.random.fork_rng(devices=[]):
        fresh = type(model)(config)
    modules = dict(model.named_modules())
    for path, module in ((path, module) for path, module in fresh.named_modules() if path in modules):
        module.training = modules[path].training
        for name, buffer in modules[path]._buffers.items():
            if buffer is not None and name in module._buffers:
                # What is not saved is computed from the configuration, here as when it is loaded.
                computed = name in module._non_persistent_buffers_set
                module._buffers[name] = module._buffers[name].to(buffer) if computed else buffer.clone()
    owners: dict[int, nn.Parameter] = {}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                fresh.get_submodule(path)._parameters[name] = owners.setdefault(id(parameter), new)
    if getattr(model, "generation_config", None) is not None:
        fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh
