"""Look at what layers take in, for a while, and leave no trace in copies of the model."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

See = Callable[[str, nn.Module, Any], Any]


class Watch:
    """Shows `see(name, layer, first tensor)` what layers take in, from now on until `close`.

    Of training steps only, or (`training=False`) of whatever runs: a validation between two steps must leave no trace.
    With `whole`, it is shown all arguments, `(args, kwargs)`. With `uncompiled`, what torch.compile has compiled runs as it is written until then: it does not see hooks that came later.
    """

    def __init__(self, layers: dict[str, nn.Module], see: See, training: bool = True, uncompiled: bool = False, whole: bool = False):
        self._handles = [m.register_forward_pre_hook(_Hook(see, name, training, whole), with_kwargs=True) for name, m in layers.items()]
        self._recompile = _UNCOMPILED.begin(self) if uncompiled else lambda: None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._recompile()


class _Uncompiled:
    """Counts who asks for it: there is one compiler for all models of a process."""

    def __init__(self) -> None:
        self._watches = 0
        self._stance: Any = None

    def begin(self, watch: Watch) -> Callable[[], Any]:
        """What ends it, once; it ends by itself with a watch that nobody holds any more."""
        # Importing the compiler takes seconds, and without it nothing is compiled.
        if not self._watches and "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
            self._stance = torch.compiler.set_stance("force_eager")
        self._watches += 1
        return weakref.finalize(watch, self._end)

    def _end(self) -> None:
        self._watches -= 1
        if not self._watches and self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


_UNCOMPILED = _Uncompiled()


def drop_dead(modules: Iterable[nn.Module]) -> None:
    """Take off copied layers what came along with the copy and sees nothing."""
    for module in modules:
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _Hook) and hook.see is None]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


class _Hook:
    """A copy or a pickle of the model takes one along that sees nothing: the state does not go with it."""

    see: See | None = None

    def __init__(self, see: See, name: str, training: bool, whole: bool):
        self.see, self.name, self.training, self.whole = see, name, training, whole

    def __getstate__(self) -> None:
        return None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.see is None or (self.training and not (module.training and torch.is_grad_enabled())):
            return
        if self.whole:
            self.see(self.name, module, (args, kwargs))
            return
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if given:
            self.see(self.name, module, given[0].detach())
