"""Mamba-2 (arXiv 2405.21060): parameter names and layouts of the public state-spaces checkpoints."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import ModelConfig
from kernels.context import Context
from kernels.conv import causal_conv1d
from kernels.cross_entropy import Recall, linear_cross_entropy
from kernels.norm import gated_rms_norm, rms_norm
from kernels.ssd import Mitigation, ssd_scan
from lightning_modules.mitigations import AnyMitigation, for_layers
from lightning_modules.state import LayerState, ModelState

if TYPE_CHECKING:
    from data.tokenizers import Tokenizer
    from lightning_modules.generation.loop import Generation


class Operators(Protocol):
    """What stands in for the functions of these names that hand something from token to token: the ranks of
    a `Context`, the single token of `lightning_modules.generation.step`."""

    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Any: ...

    def ssd_scan(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any: ...

    def positions(self, position: Tensor, starts: Tensor | None, length: int) -> tuple[Tensor, Tensor]: ...


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in fp32; under autocast the result is in the dtype of the products that read it."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps or 0.0, dtype=_compute_dtype(x))


class GatedRMSNorm(nn.Module):
    """RMSNorm over each group's channels, before or after the gate silu(z)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps, self.n_groups = config.norm_eps, config.n_groups
        self.norm_before_gate = config.norm_before_gate
        self.weight = nn.Parameter(torch.ones(config.d_inner))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(
            y,
            z,
            self.weight,
            eps=self.eps,
            n_groups=self.n_groups,
            norm_before_gate=self.norm_before_gate,
        )


class Mamba2(nn.Module):
    """in_proj -> causal convolution -> SSD scan -> gated RMSNorm -> out_proj."""

    # What stands in for `ssd_scan` while a probe reads along: the same function, seen from outside.
    scan: Callable[..., tuple[Tensor, Any]] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.d_model, config.d_in_proj, bias=False)
        # nn.Conv1d names and initialises the parameters as public checkpoints do; causal_conv1d computes.
        self.conv1d = nn.Conv1d(config.conv_dim, config.conv_dim, config.d_conv, groups=config.conv_dim)
        self.dt_bias = nn.Parameter(_initial_dt_bias(config))
        self.A_log = nn.Parameter(torch.empty(config.n_heads).uniform_(*config.A_init_range).log())
        self.D = nn.Parameter(torch.ones(config.d_inner if config.d_has_hdim else config.n_heads))
        self.norm = GatedRMSNorm(config)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        # Mamba-2 keeps the variance of the residual stream independent of depth.
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(config.n_layers)

    def forward(
        self,
        u: Tensor,
        state: LayerState,
        document_starts: Tensor | None,
        position: Tensor,
        mitigation: Mitigation,
        context: Operators | None = None,
    ) -> tuple[Tensor, LayerState]:
        """u (B, T, d_model) -> (B, T, d_model) and the state after the last token.

        position: (B,), tokens since the row's document began, before these.
        context: the ranks that hold the other pieces of the rows, if u is a piece.
        """
        c = self.config
        convolve: Callable[..., tuple[Tensor, Tensor]] = causal_conv1d
        scan = self.scan or ssd_scan
        if context is not None:
            convolve, scan = context.causal_conv1d, context.ssd_scan
        z, xBC, dt = self.in_proj(u).split([c.d_inner, c.conv_dim, c.n_heads], dim=-1)
        xBC, conv_state = convolve(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=state.conv,
            document_starts=document_starts,
        )
        x, B, C = xBC.split([c.d_inner, c.n_groups * c.d_state, c.n_groups * c.d_state], dim=-1)
        y, ssm_state = scan(
            x.unflatten(-1, (c.n_heads, c.headdim)),
            dt,
            -self.A_log.float().exp(),
            B.unflatten(-1, (c.n_groups, c.d_state)),
            C.unflatten(-1, (c.n_groups, c.d_state)),
            D=self.D.float().view(c.n_heads, -1) if c.d_has_hdim else self.D.float(),
            initial_state=state.ssm,
            document_starts=document_starts,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=c.dt_limit,
            mitigation=mitigation,
            position=position,
            chunk_size=c.chunk_size,
        )
        out = self.out_proj(self.norm(y.flatten(2), z))
        return out, LayerState(conv=conv_state, ssm=ssm_state)


def _initial_dt_bias(config: ModelConfig) -> Tensor:
    """softplus^{-1} of a dt drawn log-uniformly from [dt_min, dt_max]."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    dt = torch.empty(config.n_heads).uniform_(low, high).exp().clamp(min=config.dt_init_floor)
    return dt + torch.log(-torch.expm1(-dt))


class Block(nn.Module):
    """x + Mamba2(RMSNorm(x)), the residual stream in fp32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = Mamba2(config)

    def forward(
        self,
        hidden: Tensor,
        state: LayerState,
        document_starts: Tensor | None,
        position: Tensor,
        mitigation: Mitigation,
        context: Operators | None = None,
    ) -> tuple[Tensor, LayerState]:
        out, state = self.mixer(self.norm(hidden), state, document_starts, position, mitigation, context)
        return hidden + out, state


class Mamba2Backbone(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.init_std)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_f = RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(
        self,
        ids: Tensor,
        state: ModelState,
        document_starts: Tensor | None,
        mitigations: tuple[Mitigation, ...],
        context: Operators | None = None,
    ) -> tuple[Tensor, ModelState]:
        """ids (B, T) int64 -> hidden (B, T, d_model) and the state after the last token."""
        hidden, length = self.embedding(ids), ids.shape[1]
        if context is None:
            before, after = state.position, _advance(state.position, document_starts, length)
        else:
            before, after = context.positions(state.position, document_starts, length)
        layer_states = []
        for layer, layer_state, mitigation in zip(self.layers, state.layers, mitigations, strict=True):
            hidden, layer_state = layer(hidden, layer_state, document_starts, before, mitigation, context)
            layer_states.append(layer_state)
        return self.norm_f(hidden), ModelState(tuple(layer_states), after, state.mitigation)


def _advance(position: Tensor, document_starts: Tensor | None, length: int) -> Tensor:
    """Tokens since the row's document began, after `length` more tokens."""
    if document_starts is None:
        return position + length
    steps = torch.arange(length, device=position.device)
    last_start = torch.where(document_starts, steps, -1).amax(1)
    return torch.where(last_start >= 0, length - last_start, position + length)


@dataclass(frozen=True)
class Output:
    """logits (B, T, vocab_size) in the compute dtype, and the state after the last token."""

    logits: Tensor
    state: ModelState


class Mamba2LM(nn.Module):
    """Mamba-2 language model. The same object runs under any mitigation, in any split of the tokens.

    mitigation: one for all layers, or one for each (`lightning_modules.mitigations.LayerMitigations`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Mamba2Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=config.init_std)

    def hidden(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        *,
        document_starts: Tensor | None = None,
        mitigation: AnyMitigation | None = None,
        context: Operators | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Final hidden states (B, T, d_model) of ids (B, T) int64, continuing from `state`.

        document_starts: (B, T) bool; every layer's state is zero before a True token.
        context: the ranks among which the rows are sharded, where ids are this rank's piece. States are then
            those before and after the whole rows; inputs of the convolution count on the first rank alone.
            Or what else stands in for the operators.
        """
        rules = for_layers(mitigation, self.config.n_layers)
        if state is None:
            dtype = _compute_dtype(self.backbone.embedding.weight)
            state = ModelState.zeros(self.config, len(ids), ids.device, dtype, rules)
        state.require(rules.key, len(ids))
        return self.backbone(ids, state, document_starts, rules.on(ids.device), context)

    def forward(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        *,
        document_starts: Tensor | None = None,
        mitigation: AnyMitigation | None = None,
    ) -> Output:
        """Logits of every token and the state after the last; for long input prefer `token_losses`."""
        hidden, state = self.hidden(ids, state, document_starts=document_starts, mitigation=mitigation)
        return Output(F.linear(hidden, self.lm_head.weight), state)

    def token_losses(
        self,
        ids: Tensor,
        targets: Tensor,
        state: ModelState | None = None,
        *,
        document_starts: Tensor | None = None,
        mitigation: AnyMitigation | None = None,
        context: Context | None = None,
        recall: Recall | None = None,
    ) -> tuple[Tensor, ModelState]:
        """-log p(target) of every token (B, T) fp32, without ever holding the full logits.

        recall: for tokens that are read twice (`kernels.cross_entropy`).
        """
        hidden, state = self.hidden(
            ids, state, document_starts=document_starts, mitigation=mitigation, context=context
        )
        return linear_cross_entropy(hidden, self.lm_head.weight, targets, recall=recall), state

    def generate(
        self,
        ids: Any,
        *,
        mask: Tensor | None = None,
        tokenizer: "Tokenizer | None" = None,
        state: ModelState | None = None,
        mitigation: AnyMitigation | None = None,
        **settings: Any,
    ) -> "Generation":
        """Continue every prompt, at constant memory a token; docs/generation.md.

        Args:
            ids: prompts, a sequence of ids each, of any lengths; or a tensor (B, T).
            mask: (B, T) bool, true for tokens; what is false is padding and changes nothing.
            tokenizer: for text, stop strings and the end of text; None: only tokens.
            state: of an earlier text, of one row for all prompts or of a row each.
            settings: of `conf.generate_schema.DecodingConfig`: max_new_tokens, temperature, top_k, ...
        """
        from conf.generate_schema import DecodingConfig
        from lightning_modules.generation.loop import Generator, as_prompts, generate

        config = DecodingConfig(**settings)
        prompts = as_prompts(ids, mask)
        return generate(
            Generator(self, prompts, config, tokenizer=tokenizer, state=state, mitigation=mitigation)
        )


def _compute_dtype(t: Tensor) -> torch.dtype:
    """The dtype of a matrix product of t."""
    device = t.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype
