"""Mamba-2 (arXiv 2405.21060): parameter names and layouts of the public state-spaces checkpoints."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import ModelConfig
from kernels.arguments import products_dtype
from kernels.context import Context
from kernels.cross_entropy import Recall, linear_cross_entropy
from kernels.ssd import Mitigation
from lightning_modules.layer import AddRMSNorm, Block, Operators
from lightning_modules.mitigations import AnyMitigation, for_layers
from lightning_modules.state import ModelState

if TYPE_CHECKING:
    from data.tokenizers import Tokenizer
    from lightning_modules.generation.loop import Generation


class Mamba2Backbone(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.init_std)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_f = AddRMSNorm(config)

    def forward(
        self,
        ids: Tensor,
        state: ModelState,
        document_starts: Tensor | None,
        mitigations: tuple[Mitigation, ...],
        context: Operators | None = None,
    ) -> tuple[Tensor, ModelState]:
        """ids (B, T) int64 -> hidden (B, T, d_model) and the state after the last token."""
        residual, length = self.embedding(ids), ids.shape[1]
        branch: Tensor | None = None
        if context is None:
            before, after = state.position, _advance(state.position, document_starts, length)
        else:
            before, after = context.positions(state.position, document_starts, length)
        layer_states = []
        for layer, layer_state, mitigation in zip(self.layers, state.layers, mitigations, strict=True):
            residual, branch, layer_state = layer(
                residual, branch, layer_state, document_starts, before, mitigation, context
            )
            layer_states.append(layer_state)
        _, hidden = self.norm_f(residual, branch)
        return hidden, ModelState(tuple(layer_states), after, state.mitigation)


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
            dtype = products_dtype(self.backbone.embedding.weight)
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
