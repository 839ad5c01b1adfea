"""Rewriting a recording: neighbouring calls become one call of a fused op.

A rule reads ``op arguments -> outputs; op ... => fused op``. The names in it are memory: the same name, the same array.
The fused call stands where the last of its parts stood, or else where the first stood. That is allowed only where it
changes nothing else:

- what the fused call no longer writes, nobody reads;
- what the moved parts read or write, no call in between writes, nor reads what they write;
- the fused call writes nothing that its parts did not write, and no output over one of its inputs;
- the engine has the fused op, and does not rather compute its parts one by one.

Before the rules, products of wide sparse rows become products of what is stored of these, under the same conditions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from .interop import WIDE
from .kernels.engine import Call, Engine
from .kernels.ops import OPS, Array, Op

__all__ = ["FUSED", "RULES", "Rule", "fuse"]

Memory: TypeAlias = Any  # an array, or the name of a slot


class Pattern(NamedTuple):
    """One call in a rule: the op and the names of its arguments, inputs first."""

    op: Op
    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Pattern:
        name, *names = text.replace("->", " ").split()
        op = OPS[name]
        if len(names) != len(op.inputs) + len(op.outputs):
            raise ValueError(f"{name} takes {op.signature}, got {text!r}")
        return cls(op, tuple(names))


class Rule(NamedTuple):
    """Calls that can be one call."""

    parts: tuple[Pattern, ...]
    fused: Pattern

    @classmethod
    def parse(cls, text: str) -> Rule:
        parts, _, fused = text.partition("=>")
        return cls(tuple(map(Pattern.parse, parts.split(";"))), Pattern.parse(fused))


RULES = tuple(
    map(
        Rule.parse,
        [
            "dense_forward x w b -> z; relu_forward z -> y => dense_relu_forward x w b -> y",
            "dense_input_grad dz w -> dy; relu_backward dy y -> dx => dense_relu_input_grad dz w y -> dx",
            "dense_relu_input_grad dz w y -> dx; dense_bias_grad dx -> db => dense_relu_grads dz w y -> dx db",
            "dense_input_grad dz w -> dy; leaky_relu_backward dy y slope -> dx; dense_bias_grad dx -> db"
            " => dense_leaky_relu_grads dz w y slope -> dx db",
            "dense_input_grad dz w -> dy; elu_backward dy y alpha -> dx; dense_bias_grad dx -> db"
            " => dense_elu_grads dz w y alpha -> dx db",
            "dense_input_grad dz w -> dy; tanh_backward dy y -> dx; dense_bias_grad dx -> db"
            " => dense_tanh_grads dz w y -> dx db",
            "dense_input_grad dz w -> dy; sigmoid_backward dy y -> dx; dense_bias_grad dx -> db"
            " => dense_sigmoid_grads dz w y -> dx db",
            "dense_forward x w b -> z; softmax_cross_entropy z t total -> dz"
            " => dense_softmax_cross_entropy x w b t total -> dz",
            "dense_softmax_cross_entropy x w b t total -> dz; dense_relu_grads dz w x -> dx db"
            " => classifier_grads x w b t total -> dz dx db",
            "dense_weight_grad x dz -> dw; sgd w dw lr => dense_weight_sgd x dz w lr",
            "dense_bias_grad dz -> db; sgd b db lr => dense_bias_sgd dz b lr",
            "classifier_grads x w b t total -> dz dx db; dense_bias_sgd dz b lr; dense_weight_sgd x dz w lr"
            " => classifier_sgd x w b t total lr -> dx db",
            "dense_relu_grads dz w x -> dx db; dense_weight_sgd x dz w lr => dense_relu_sgd x dz w lr -> dx db",
        ],
    )
)

#: What multiplies sparse rows as they are stored, in place of ops that take them made dense.
OF_STORED = {"dense_forward": "sparse_forward", "dense_weight_grad": "sparse_weight_grad"}

#: Names of the fused ops, which an engine need not have.
FUSED = frozenset(rule.fused.op.name for rule in RULES) | frozenset(OF_STORED.values())


class Addresses:
    """Where a recording's arrays lie; each is asked for its addresses once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[int, tuple[Memory, tuple[int, int]]] = {}  # with the array, whose id is then its own

    def span(self, memory: Memory) -> tuple[int, int]:
        if id(memory) not in self._known:
            self._known[id(memory)] = memory, self._engine.span(memory)
        return self._known[id(memory)][1]

    def same(self, a: Memory, b: Memory) -> bool:
        if isinstance(a, str) or isinstance(b, str):
            return isinstance(a, str) and isinstance(b, str) and a == b
        return a is b or (a.shape, a.strides, a.dtype, self.span(a)) == (b.shape, b.strides, b.dtype, self.span(b))

    def overlap(self, some: Sequence[Memory], others: Sequence[Memory]) -> bool:
        spans = [self.span(memory) for memory in some if not isinstance(memory, str)]
        if not spans:
            return False
        for first, last in (self.span(memory) for memory in others if not isinstance(memory, str)):
            if any(first < stop and start < last for start, stop in spans):
                return True
        return False


def fuse(
    calls: Sequence[Call], engine: Engine, kept: Sequence[Array] = (), rules: Sequence[Rule] = RULES
) -> list[Call]:
    """Apply `rules` until none fits.

    Parameters
    ----------
    calls : sequence of Call
        A recording.
    engine : Engine
        Which fused ops there are, and where arrays lie in memory.
    kept : sequence of array
        What is read after a replay.
    """
    addresses = Addresses(engine)
    calls = _multiplied_as_stored(calls, engine, addresses, kept)
    if any(rule.fused.op is OPS["dense_weight_sgd"] and engine.supports(rule.fused.op) for rule in rules):
        calls = _split_sgd(calls, addresses)
    for rule in rules:
        if engine.supports(rule.fused.op) and {part.op for part in rule.parts} <= {call.op for call in calls}:
            while fused := _first_fused(calls, rule, engine, addresses, kept):
                calls = fused
    return [_flat_sgd(call) for call in calls]


def _multiplied_as_stored(
    calls: Sequence[Call], engine: Engine, addresses: Addresses, kept: Sequence[Array]
) -> list[Call]:
    """Calls without `sparse_rows`, where these are wide and all that read them can read what is stored instead."""
    for place, take in enumerate(calls):
        if take.op is OPS["sparse_rows"] and take.arguments[-1].shape[1] >= WIDE:
            later = [_of_stored(take, call, addresses) for call in calls[place + 1 :]]
            changed = [memory for call in later if call for memory in writes(call)]
            if all(call and engine.supports(call.op) for call in later) and not addresses.overlap(
                [*take.arguments], [*kept, *changed]
            ):
                return [*calls[:place], *filter(None, later)]
    return list(calls)


def _of_stored(take: Call, call: Call, addresses: Addresses) -> Call | None:
    """A call that reads what is stored in place of the rows that `take` gives; None where there is none."""
    rows = take.arguments[-1]
    if not addresses.overlap([rows], reads(call)):
        return call
    first, *others = call.arguments
    if call.op.name not in OF_STORED or not addresses.same(first, rows) or addresses.overlap([rows], others):
        return None
    op = OPS[OF_STORED[call.op.name]]
    named = {
        arg.name: memory
        for of, arguments in (take, call)
        for arg, memory in zip((*of.inputs, *of.outputs), arguments, strict=True)
    }
    return Call(op, tuple(named[arg.name] for arg in (*op.inputs, *op.outputs)))


def _split_sgd(calls: Sequence[Call], addresses: Addresses) -> list[Call]:
    """`sgd` over all parameters as one `sgd` for each gradient, each an output, once; between them is padding."""
    split = []
    for call in calls:
        pieces: list[Call] = []
        if call.op is OPS["sgd"]:
            parameters, gradients, lr = call.arguments
            start = addresses.span(gradients)[0]
            others = [memory for other in calls if other is not call for memory in writes(other)]
            written = [memory for memory in others if addresses.overlap([memory], [gradients])]
            changed = [memory for other in calls for memory in updates(other)]
            for i, gradient in enumerate(written):
                if addresses.overlap([gradient], [*written[:i], *changed]):
                    pieces = []
                    break
                first = (addresses.span(gradient)[0] - start) // gradient.itemsize
                view = parameters[first : first + gradient.size].reshape(gradient.shape)
                pieces.append(Call(call.op, (view, gradient, lr)))
        split += pieces or [call]
    return split


def _flat_sgd(call: Call) -> Call:
    """The call, flat again where `_split_sgd` reshaped it."""
    if call.op is not OPS["sgd"]:
        return call
    parameters, gradients, lr = call.arguments
    return Call(call.op, (parameters.reshape(-1), gradients.reshape(-1), lr))


def _first_fused(
    calls: list[Call], rule: Rule, engine: Engine, addresses: Addresses, kept: Sequence[Array]
) -> list[Call] | None:
    for places, memory in _matches(calls, rule.parts, addresses):
        fused = Call(rule.fused.op, tuple(memory[name] for name in rule.fused.names))
        if not engine.fuses(fused):
            continue
        for place in (places[-1], places[0]):
            if _is_safe(calls, places, place, fused, addresses, kept):
                parts = set(places) - {place}
                return [fused if i == place else call for i, call in enumerate(calls) if i not in parts]
    return None


def _matches(
    calls: Sequence[Call],
    parts: Sequence[Pattern],
    addresses: Addresses,
    start: int = 0,
    memory: dict[str, Memory] | None = None,
) -> Iterator[tuple[list[int], dict[str, Memory]]]:
    """The places of calls that are the parts of a rule, in order, and the memory that the rule's names stand for."""
    if not parts:
        yield [], memory or {}
        return
    part = parts[0]
    for i in range(start, len(calls)):
        if calls[i].op is not part.op:
            continue
        bound = dict(memory or {})
        if all(
            addresses.same(bound.setdefault(name, argument), argument)
            for name, argument in zip(part.names, calls[i].arguments, strict=True)
        ):
            for places, complete in _matches(calls, parts[1:], addresses, i + 1, bound):
                yield [i, *places], complete


def _is_safe(
    calls: Sequence[Call], places: Sequence[int], place: int, fused: Call, addresses: Addresses, kept: Sequence[Array]
) -> bool:
    """Whether the calls at `places` may become `fused` at `place`."""
    written = [memory for i in places for memory in writes(calls[i])]
    still = writes(fused)
    gone = [memory for memory in written if not any(addresses.same(memory, other) for other in still)]
    others = [call for i, call in enumerate(calls) if i not in places]
    return (
        all(any(addresses.same(memory, other) for other in written) for memory in still)
        and not addresses.overlap(gone, [*kept, *reads(fused), *(memory for call in others for memory in reads(call))])
        and not addresses.overlap(fused.arguments[len(fused.op.inputs) :], reads(fused))
        and not any(
            addresses.overlap(writes(calls[i]), [*reads(calls[moved]), *writes(calls[moved])])
            or addresses.overlap(reads(calls[i]), writes(calls[moved]))
            for moved in places
            for i in range(min(moved, place) + 1, max(moved, place))
            if i not in places
        )
    )


def reads(call: Call) -> list[Memory]:
    """What a call reads: its inputs, those that it updates too."""
    return list(call.arguments[: len(call.op.inputs)])


def updates(call: Call) -> list[Memory]:
    """The inputs that a call changes in place."""
    return [memory for arg, memory in zip(call.op.inputs, call.arguments, strict=False) if arg.inplace]


def writes(call: Call) -> list[Memory]:
    """What a call writes: its outputs, and the inputs that it updates."""
    return [*updates(call), *call.arguments[len(call.op.inputs) :]]
