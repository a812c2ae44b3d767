"""A recurrent model of transformers, seen as Mamba2LM is: a segment in, the state out.

    guest = load_guest("path/to/rwkv")
    hidden, state = guest.hidden(ids)            # the state is a value: what was handed out never changes
    losses, state = guest.token_losses(ids, targets, state)
    guest.states(state)                          # (B, H, P, N) of each recurrent layer
    guest.config.layer_names, guest.config.n_heads

What a family must tell is in `Family`; an adapter is a file beside this one. Mitigations are operators of our
own scan: a guest runs without.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from conf.fields import option
from conf.schema import ModelConfig
from kernels.cross_entropy import linear_cross_entropy
from lightning_modules.mitigations import AnyMitigation, for_layers

Layers = tuple[tuple[Tensor, ...], ...]


@dataclass(kw_only=True)
class GuestConfig(ModelConfig):
    """Shape of a guest, in our names; layers and heads are those that carry a recurrent state.

    d_state is N and headdim P of a head's state, whatever the family calls them.
    """

    family: str = option("", "model_type in transformers")
    heads: int = option(1, "heads of a layer; of families without heads its channels")
    layer_names: list[str] = option([], "modules of the layers")
    head_names: str = option("head", "what a head is")

    def __post_init__(self) -> None:
        """What our own model could not be, these may."""

    @property
    def n_heads(self) -> int:
        return self.heads


@dataclass(frozen=True)
class GuestState:
    """What every layer carries, rows first, and tokens read."""

    layers: Layers
    position: Tensor  # (B,) int64
    mitigation: str = "none"

    def rows(self, index: Tensor) -> "GuestState":
        """Select or repeat rows; `index` (n,) int64."""
        layers = tuple(tuple(t.index_select(0, index) for t in layer) for layer in self.layers)
        return replace(self, layers=layers, position=self.position.index_select(0, index))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)


class Trace(NamedTuple):
    """What a layer did to its state at each token and head, (B, T, H) each.

    dt: the step, or what a family has in its place; log_decay: the logarithm of what is kept of the state,
    the mean over N where it differs; insertion: the Frobenius norm of what is added.
    """

    dt: Tensor
    log_decay: Tensor
    insertion: Tensor


class Family(ABC):
    """How a family's model in transformers is read.

    functions: the functions in its module that carry out the recurrence of a layer, called in the order of
    layers; while a probe listens their arguments are seen.
    """

    functions: tuple[str, ...] = ()
    # What transformers gets wrong, and the adapter or Guest puts right:
    single_tokens_by_row = False  # one token of several rows is read wrongly
    corrects = False  # `call` changes what the functions give where there is a state already

    @abstractmethod
    def config(self, theirs: Any) -> GuestConfig: ...

    @abstractmethod
    def arguments(self, theirs: Any, state: GuestState | None, ids: Tensor) -> dict[str, Any]:
        """What the model takes to go on from a state; nothing of `state` may be changed by the call."""

    @abstractmethod
    def layers(self, arguments: dict[str, Any]) -> Layers:
        """What every layer carries afterwards, from the same arguments."""

    @abstractmethod
    def states(self, theirs: Any, layers: Layers) -> list[Tensor]:
        """(B, H, P, N) fp32 of each recurrent layer."""

    def call(
        self,
        original: Callable[..., Any],
        function: str,
        before: Tensor | None,
        /,
        *args: Any,
        **options: Any,
    ) -> Any:
        """One of `functions`, carried out; before: the layer's state, (B, H, P, N), if there is one and the
        family `corrects`."""
        return original(*args, **options)

    @abstractmethod
    def trace(self, function: str, *args: Any, **options: Any) -> Trace:
        """What a call of one of `functions` does."""


# Called behind every piece: a trace and a state (B, H, P, N) a recurrent layer.
Listener = Callable[[list[Trace], list[Tensor]], None]


class Guest(nn.Module):
    """A causal language model of transformers with the interface of Mamba2LM."""

    def __init__(self, model: Any, family: Family) -> None:
        super().__init__()
        self.model, self.family = model.eval(), family
        self.config = family.config(model.config)
        self.body = model.base_model
        self.listener: Listener | None = None
        # How many of so many tokens come next in one piece, while a listener is there.
        self.next_piece: Callable[[int], int] = lambda length: length

    @property
    def lm_head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    @torch.no_grad()
    def hidden(
        self, ids: Tensor, state: GuestState | None = None, *, mitigation: AnyMitigation | None = None
    ) -> tuple[Tensor, GuestState]:
        """Final hidden states (B, T, d_model) of ids (B, T) int64, continuing from `state`."""
        rule = for_layers(mitigation, self.config.n_layers).key
        if rule != "none":
            raise ValueError(f"mitigation.name={rule}: acts in our own scan: a {self.config.family} has none")
        pieces, begin = [], 0
        while begin < ids.shape[1]:
            left = ids.shape[1] - begin
            length = left if self.listener is None else self.next_piece(left)
            hidden, state = self._read(ids[:, begin : begin + length], state)
            pieces.append(hidden)
            begin += length
        assert state is not None
        return torch.cat(pieces, 1), state

    def token_losses(
        self,
        ids: Tensor,
        targets: Tensor,
        state: GuestState | None = None,
        *,
        mitigation: AnyMitigation | None = None,
    ) -> tuple[Tensor, GuestState]:
        """-log p(target) of every token (B, T) fp32, without ever holding the full logits."""
        hidden, state = self.hidden(ids, state, mitigation=mitigation)
        return linear_cross_entropy(hidden, self.lm_head.weight, targets), state

    def states(self, state: GuestState) -> list[Tensor]:
        """(B, H, P, N) fp32 of each recurrent layer."""
        return self.family.states(self.model.config, state.layers)

    def state_bytes(self) -> int:
        """What one sequence carries behind its first token."""
        device = self.lm_head.weight.device
        return self.hidden(torch.zeros(1, 1, dtype=torch.int64, device=device))[1].nbytes

    def growth(self) -> tuple[list[int], int]:
        """Numbers of the layers whose state grows with every token, as attention's does, and the bytes that a
        token adds to a row."""
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.lm_head.weight.device)
        _, first = self.hidden(ids)
        _, second = self.hidden(ids, first)
        sizes = [[sum(map(Tensor.numel, layer)) for layer in state.layers] for state in (first, second)]
        growing = [i for i, (one, two) in enumerate(zip(*sizes, strict=True)) if two > one]
        return growing, second.nbytes - first.nbytes

    def _read(self, ids: Tensor, state: GuestState | None) -> tuple[Tensor, GuestState]:
        rows, length = ids.shape
        if self.family.single_tokens_by_row and length == 1 and rows > 1:
            return self._read_by_row(ids, state)
        arguments = self.family.arguments(self.model.config, state, ids)
        with self._watched(state) as traces:
            hidden = self.body(input_ids=ids, use_cache=True, **arguments).last_hidden_state
        before = state.position if state is not None else ids.new_zeros(rows)
        after = GuestState(self.family.layers(arguments), before + length)
        if self.listener is not None:
            self.listener(traces, self.states(after))
        return hidden, after

    def _read_by_row(self, ids: Tensor, state: GuestState | None) -> tuple[Tensor, GuestState]:
        listener, self.listener = self.listener, None
        heard: list[tuple[list[Trace], list[Tensor]]] = []
        if listener is not None:
            self.listener = lambda traces, states: heard.append((traces, states))
        try:
            read = []
            for row in range(len(ids)):
                index = torch.tensor([row], device=ids.device)
                read.append(self._read(ids[row : row + 1], None if state is None else state.rows(index)))
        finally:
            self.listener = listener
        if listener is not None:
            by_layer = zip(*(traces for traces, _ in heard), strict=True)
            traces = [Trace(*map(torch.cat, zip(*layer, strict=True))) for layer in by_layer]
            listener(traces, [torch.cat(layer) for layer in zip(*(s for _, s in heard), strict=True)])
        states = [state for _, state in read]
        layers = tuple(
            tuple(map(torch.cat, zip(*layer, strict=True)))
            for layer in zip(*(state.layers for state in states), strict=True)
        )
        after = GuestState(layers, torch.cat([state.position for state in states]))
        return torch.cat([hidden for hidden, _ in read]), after

    @contextmanager
    def _watched(self, state: GuestState | None) -> Iterator[list[Trace]]:
        """Within the block the family's functions are seen, and put right, on the way; yields the traces."""
        traces: list[Trace] = []
        wrong = self.family.corrects and state is not None
        if self.listener is None and not wrong:
            yield traces
            return
        module = sys.modules[type(self.model).__module__]
        originals = {name: getattr(module, name) for name in self.family.functions}
        before = iter(self.states(state) if wrong and state is not None else [None] * self.config.n_layers)

        def seen(name: str) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                if self.listener is not None:
                    traces.append(self.family.trace(name, *args, **options))
                return self.family.call(originals[name], name, next(before), *args, **options)

            return call

        try:
            for name in originals:
                setattr(module, name, seen(name))
            yield traces
        finally:
            for name, original in originals.items():
                setattr(module, name, original)
