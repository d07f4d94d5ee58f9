"""`nn.MultiheadAttention` as four linear layers that can be cut.

PyTorch's module multiplies with its weights itself, three of them packed into one, so no layer can be put in their place. `Attention` and the three
functions under it need torch alone: to do without laconic, copy them.
"""

from __future__ import annotations

import warnings
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_module, has_gradient_hooks, hooked


class Attention(nn.Module):
    r"""Computes what an `nn.MultiheadAttention` computes, with its weights, called as it is called.

    For each head, softmax(Q K^T / sqrt(d) + mask) V with Q = q_proj(query), K = k_proj(key), V = v_proj(value); the heads side by side go through `out_proj`.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: plain linear layers; `out_proj` keeps the parameters of `fused`.
        num_heads: how many heads are left; it shrinks with them.
    """

    def __init__(self, fused: nn.MultiheadAttention):
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = fused.embed_dim, fused.kdim, fused.vdim
        self.num_heads, self.dropout, self.batch_first = fused.num_heads, fused.dropout, fused.batch_first
        # `nn.TransformerEncoderLayer` has a kernel that reads packed weights: these tell it that here are none.
        self.in_proj_bias, self._qkv_same_embed_dim = None, False
        separate = (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
        weights = fused.in_proj_weight.chunk(3) if fused.in_proj_weight is not None else separate
        biases = (None,) * 3 if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)
        self.out_proj.weight, self.out_proj.bias = fused.out_proj.weight, fused.out_proj.bias
        self.train(fused.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes and masks (True: not attended) as for `nn.MultiheadAttention`; the weights of the heads only with `need_weights`."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask: give the mask as well")
        single, inputs = query.dim() == 2, [query, key, value]
        if single:
            inputs = [x[None] for x in inputs]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        projections = zip((self.q_proj, self.k_proj, self.v_proj), inputs, strict=True)
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer, x in projections)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _joint_mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = self.out_proj(heads.transpose(1, 2).flatten(-2))
        if single:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _joint_mask(attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores, `[batch or 1, heads or 1, queries, keys]`."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    masks = []
    if attention is not None:
        shape = (queries, keys) if attention.dim() == 2 else (batch * heads, queries, keys)
        _check_mask("attn_mask", attention, shape, f" ({heads} heads now)")
        masks.append(attention if attention.dim() == 2 else attention.unflatten(0, (batch, heads)))
    if padding is not None:
        _check_mask("key_padding_mask", padding, (batch, keys))
        masks.append(padding[:, None, None, :])
    added = [torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m.to(q.dtype) for m in masks]
    return sum(added[1:], added[0]) if added else None


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...], note: str = "") -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name} of {mask.dtype}: must be bool (True: not attended) or floating (added to the scores)")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} of shape {tuple(mask.shape)}: expected {shape}{note}")


def unfuse(model: nn.Module) -> nn.Module:
    """Make four plain layers of every `nn.MultiheadAttention` in a model, so that its ranks and heads can go.

    Every such module is replaced in place by an `Attention` with the same weights: the outputs are the same up to rounding (but for those at padded positions of an
    `nn.TransformerEncoder`, which its fused kernel, in evaluation and without gradients, sets to zero). In `nn.TransformerEncoderLayer` the two layers of
    the MLP can be cut then, too; its fused inference kernel, which reads all of these weights, is not used any more. Do it to a fresh model, before the optimizer
    is built and after pretrained weights are loaded, and again to the fresh model that a saved one is loaded into:

        model = laconic.unfuse(net())
        model = laconic.load("compact", laconic.unfuse(net()))

    Args:
        model: any module; where it is itself an `nn.MultiheadAttention`, the new module is returned.

    Returns:
        The model.

    Warns:
        Where there is nothing to replace, and of each module that stays as it is: a subclass, or one with `add_bias_kv`, `add_zero_attn`, hooks, or weights that it shares.

    Raises:
        InvalidTypeError: `model` is not a module.
    """
    check_module(model)
    fused = {module: name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    if not fused:
        already = any(isinstance(module, Attention) for module in model.modules())
        why = "is unfused already" if already else "has no nn.MultiheadAttention"
        warnings.warn(f"laconic: the model {why}: nothing was changed", stacklevel=2)
    holders: Counter[Tensor] = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    plain: dict[nn.Module, nn.Module] = {}
    for module, name in fused.items():
        reason = _why_not(module, holders)
        if reason:
            warnings.warn(f"laconic: {name or 'the model'} stays as it is: {reason}", stacklevel=2)
        else:
            plain[module] = Attention(module)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = plain.get(child, child) if child is not None else None
    for encoder in (m for m in model.modules() if isinstance(m, nn.TransformerEncoder)):
        if any(isinstance(m, Attention) for m in encoder.modules()):
            encoder.use_nested_tensor = False  # nested tensors are for the fused kernel
    return plain.get(model, model)


def _why_not(module: nn.MultiheadAttention, holders: Counter[Tensor]) -> str | None:
    """The reason to leave a module alone, or None."""
    if type(module) is not nn.MultiheadAttention:
        return f"{type(module).__name__} is a class of its own (a subclass, or parametrized)"
    if module.bias_k is not None or module.add_zero_attn:
        return "it has add_bias_kv or add_zero_attn"
    own = [p for p in module._parameters.values() if p is not None]
    if any(hooked(m) for m in module.modules()) or any(has_gradient_hooks(p) for p in own):
        return "it has hooks, which would be lost"
    if any(holders[p] > 1 for p in own):
        return "another module holds its weights, too"
    return None
