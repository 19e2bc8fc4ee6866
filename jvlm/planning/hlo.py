"""What a compiled program moves and multiplies, read off its text.

XLA's own `cost_analysis` counts the body of a loop once, and does not see whose links a collective uses. Here every
instruction counts as often as the loops around it run.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np

from jvlm.parallel import collectives

BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')
# A kernel's operands that are larger than its results hold what so many layers read part of.
_OF_LAYERS = re.compile(r'op_name="[^"]*\bone_of_(\d+)_layers')
_AT_MOST = re.compile(r'op_name="[^"]*\bat_most_(\d+)_times')
_OPCODE = re.compile(r"^([a-z][\w\-]*)\(")
# Slices talk through their hosts: XLA writes what is sent there, and what it is for, as an attribute.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
# Moves nothing: other instructions count what it stands for.
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast while conditional call iota after-all partition-id replica-id "
    "opt-barrier add-dependency async-start async-update async-done domain all-gather-done all-reduce-done "
    "all-to-all-done reduce-scatter-done ragged-all-to-all-done collective-broadcast-done collective-permute-done "
    "copy-done slice-done send send-done recv recv-done".split()
)
# These read part of their first operand; those write part of it, as large as the operand of this number.
_SLICES = ("dynamic-slice", "slice", "gather")
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
_COST = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: bytes an element, sizes, and whether it lives in memory other than HBM (VMEM, SMEM)."""

    bits: int
    sizes: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.sizes) * self.bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: its results, opcode, names of operands, and all that follows the opcode."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program: how often it runs, what it moves each time, between whom.

    Attributes:
      sent: bytes that each device sends, at least, each time.
      groups: see `jvlm.parallel.collectives.groups`; all devices are one row. None between slices: the text names the
        slices alone, and ``sent`` is what each device hands to the host.
    """

    kind: str
    name: str
    times: float
    sent: float
    groups: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A program for one device.

    Attributes:
      flops: of matrix products outside kernels, recomputation included.
      hbm: bytes read and written by instructions, as far as their text says.
      saved_activations: bytes that loops fill layer by layer and others read: what the backward pass needs of the
        forward one.
    """

    collectives: tuple[Collective, ...]
    flops: float
    hbm: float
    saved_activations: float


def read(text: str, branch_frequency: Mapping[str, float] = MappingProxyType({})) -> Traffic:
    """Return the traffic of a compiled program's text (`compiled.as_text()`).

    Args:
      branch_frequency: how often a branch of a conditional is taken, by what the names of the operations in it
        contain. That is not in the text: without an entry here each branch counts, as if all were taken.
    """
    program = _parse(text)
    partitions = int(named[1]) if (named := re.search(r"\bnum_partitions=(\d+)", text)) else 1
    transfers, flops, hbm = [], 0.0, 0.0
    for name, times in _times(program, branch_frequency).items():
        fused = name in program.fused
        inside = {i.name: i for i in program.computations[name]}
        for one in inside.values():
            kind = _kind(one)
            if kind:
                transfers.append(_collective(one, kind, name, times, inside, partitions))
            if one.opcode in ("dot", "convolution"):
                flops += times * _product_flops(one, inside)
            if not fused and one.opcode not in _FREE:
                hbm += times * _moved(one, inside, program)
    return Traffic(tuple(transfers), flops, hbm, _saved_activations(program))


def _saved_activations(program: _Program) -> float:
    """Bytes of `Traffic.saved_activations`. XLA for TPU reserves their memory before the first loop."""
    reserved = sum(_in_hbm(i) for i in program.computations[program.entry] if '"AllocateBuffer"' in i.rest)
    return reserved or max(map(_passed_on, program.computations.values()))


def _passed_on(computation: list[Instruction]) -> float:
    """Bytes that begin as constants, and go on from one loop to another."""
    named = {i.name: i for i in computation}
    loops = (i for i in computation if i.opcode == "while" and i.operands[0] in named)
    carried = {loop.name: named[loop.operands[0]].operands for loop in loops}
    total = 0.0
    for values in carried.values():
        for value in (named.get(name) for name in values):
            loop = value.operands[0] if value and value.opcode == "get-tuple-element" else None
            if loop in carried and _is_constant(carried[loop][_index(value)], named):
                total += value.bytes
    return total


def _index(element: Instruction) -> int:
    return int(re.search(r"index=(\d+)", element.rest)[1])


def _is_constant(name: str, named: Mapping[str, Instruction]) -> bool:
    """Whether a value is made of nothing: by a fusion or a broadcast without operands but constants."""
    one = named.get(name)
    if one and one.opcode == "get-tuple-element":
        one = named.get(one.operands[0])
    if one is None or one.opcode not in ("fusion", "broadcast"):
        return False
    return all(n in named and named[n].opcode == "constant" for n in one.operands)


@dataclasses.dataclass(frozen=True)
class _Program:
    computations: dict[str, list[Instruction]]
    entry: str
    fused: frozenset[str]


def _parse(text: str) -> _Program:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = _COMPUTATION.match(line)
            if head:
                current = head[2]
                computations[current] = []
                entry = current if head[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            match = _INSTRUCTION.match(line)
            if match:
                computations[current].append(_instruction(match[2], match[3], bool(match[1])))
    fused = {
        called
        for instructions in computations.values()
        for one in instructions
        if one.opcode not in ("while", "conditional", "call", "async-start")
        for _, called in _CALLED.findall(one.rest)
    }
    return _Program(computations, entry, frozenset(fused))


def _instruction(name: str, text: str, root: bool) -> Instruction:
    types, rest = _split_type(text)
    opcode = _OPCODE.match(rest)
    operands = ()
    if opcode:
        inside = _parenthesised(rest[opcode.end() - 1 :])
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    shapes = tuple(_shape(*array) for array in _ARRAY.findall(types))
    return Instruction(name, shapes, opcode[1] if opcode else "", operands, rest, root)


def _split_type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    inside = _parenthesised(text)
    return inside, text[len(inside) :].lstrip()


def _parenthesised(text: str) -> str:
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: index + 1]
    return text


def _shape(kind: str, sizes: str, layout: str) -> Shape:
    bits = BITS.get(kind) or int(re.search(r"\d+", kind)[0])
    return Shape(bits, tuple(int(n) for n in sizes.split(",") if n), bool(re.search(r"S\([1-9]\)", layout)))


def _times(program: _Program, branch_frequency: Mapping[str, float]) -> dict[str, float]:
    """How often each computation runs: once for each call, times the trips of the loops around it."""
    times: dict[str, float] = collections.defaultdict(float, {program.entry: 1.0})
    for name in _callers_first(program):
        for one in program.computations[name]:
            for called, trips in _calls(one, program):
                share = (
                    _share(program.computations.get(called, []), branch_frequency)
                    if one.opcode == "conditional"
                    else 1.0
                )
                times[called] += times[name] * trips * share
    return {name: count for name, count in times.items() if count and name in program.computations}


def _share(branch: list[Instruction], branch_frequency: Mapping[str, float]) -> float:
    return next((share for one in branch for part, share in branch_frequency.items() if part in one.rest), 1.0)


def _calls(one: Instruction, program: _Program) -> Iterator[tuple[str, int]]:
    called = _CALLED.findall(one.rest)
    trips = _trips(one, dict(called), program) if one.opcode == "while" else 1
    for how, name in called:
        yield name, trips if how == "body" else 1
    for branches in _BRANCHES.findall(one.rest):
        for called in branches.split(","):
            yield called.strip().lstrip("%"), 1


def _trips(loop: Instruction, called: dict[str, str], program: _Program) -> int:
    """As XLA noted it, or the bound that a counter from 0 is compared with, or what the operation's name promises at
    most ("at_most_8_times"); 1 for a loop of unknown length.
    """
    if match := _TRIPS.search(loop.rest) or _AT_MOST.search(loop.rest):
        return int(match[1])
    condition = program.computations.get(called.get("condition", ""), [])
    bounds = [int(c[1]) for i in condition if (c := re.match(r"constant\((\d+)\)", i.rest))]
    return max(bounds, default=1)


def _callers_first(program: _Program) -> list[str]:
    order, seen = [], set()

    def visit(name: str) -> None:
        seen.add(name)
        for one in program.computations[name]:
            for called, _ in _calls(one, program):
                if called in program.computations and called not in seen:
                    visit(called)
        order.append(name)

    visit(program.entry)
    return order[::-1]


def _kind(one: Instruction) -> str | None:
    opcode = one.opcode.removesuffix("-start")
    between = _BETWEEN_SLICES.search(one.rest) if opcode == "send" else None
    if between:
        return between[1].lower().replace("_", "-")
    return opcode if opcode in collectives.KINDS else None


def _collective(one, kind, computation, times, inside, partitions) -> Collective:
    if one.opcode == "send":
        return Collective(kind, one.name, times, one.shapes[0].bytes, None)
    groups = collectives.groups(one.rest)
    groups = np.arange(partitions)[None] if groups is None else groups
    size = groups.shape[1]
    operands = sum(inside[name].bytes for name in one.operands if name in inside)
    if kind == "all-gather":
        # results of a -start are operands and results together
        whole = one.bytes - operands if one.opcode.endswith("-start") else one.bytes
        sent = whole * (size - 1) / size
    elif kind == "collective-permute":
        sent = operands
    else:
        sent = operands * (size - 1) / size
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"  # XLA for TPU writes it as a fusion of this name
        elif kind == "all-reduce":
            sent *= 2
    return Collective(kind, one.name, times, sent, groups)


def _product_flops(one: Instruction, inside: dict[str, Instruction]) -> float:
    operands = [inside.get(name) for name in one.operands[:2]]
    if len(operands) < 2 or not all(operand and operand.shapes for operand in operands):
        return 0.0
    left, right = (operand.shapes[0].sizes for operand in operands)
    result = one.shapes[0].sizes
    if one.opcode == "dot":
        contracted = re.search(r"rhs_contracting_dims=\{([\d,]*)\}", one.rest)
        return 2.0 * math.prod(result) * math.prod(right[int(n)] for n in contracted[1].split(",") if n)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    if not labels:
        return 0.0
    dimensions = [dict(zip(labels[i + 1], sizes, strict=True)) for i, sizes in enumerate((left, right, result))]
    groups = int(match[1]) if (match := re.search(r"batch_group_count=(\d+)", one.rest)) else 1
    spatial = sorted(label for label in dimensions[1] if label.isdigit())
    meetings = math.prod(
        _meetings(one.rest, index, *(of[label] for of in dimensions)) for index, label in enumerate(spatial)
    )
    return 2.0 * dimensions[2]["b"] * dimensions[2]["f"] * dimensions[1]["i"] * meetings / groups


def _meetings(text: str, index: int, inputs: int, window: int, outputs: int) -> int:
    """Pairs of an output and an element of the window that meet an input, along one spatial dimension.

    XLA for TPU writes products with a batch as convolutions whose windows lie in padding but for one element.
    """

    def setting(name: str, default: str) -> list[int]:
        match = re.search(rf"window=\{{[^}}]*\b{name}=([\d_x\-]+)", text)
        return [int(n) for n in (match[1].split("x")[index] if match else default).split("_")]

    (stride,), (before, *_) = setting("stride", "1"), setting("pad", "0_0")
    (spread,), (dilation,) = setting("lhs_dilate", "1"), setting("rhs_dilate", "1")
    position = np.arange(outputs)[:, None] * stride + np.arange(window) * dilation - before
    return int(((position >= 0) & (position <= (inputs - 1) * spread) & (position % spread == 0)).sum())


def _moved(one: Instruction, inside: dict[str, Instruction], program: _Program) -> float:
    """Bytes of HBM that an instruction reads and writes: operands and results, and of slices the slice alone."""
    if one.opcode in _SLICES:
        return 2 * _in_hbm(one)
    if one.opcode in ("copy-start", "slice-start"):
        # named are source, what arrives, and a flag: often it arrives in memory of the core
        arrays = [shape for shape in one.shapes if shape.sizes]
        size = min(shape.bytes for shape in arrays)
        return size * sum(not shape.on_chip for shape in arrays)
    if one.opcode in _IN_PLACE:
        update = inside.get(one.operands[_IN_PLACE[one.opcode]])
        return 2 * _in_hbm(update) if update else _in_hbm(one)
    if one.opcode == "custom-call":
        if "ConcatBitcast" in one.rest:
            return 0.0
        if cost := _COST.search(one.rest):  # by the kernel itself: one that works in place touches little
            return float(cost[1])
        if layers := _OF_LAYERS.search(one.rest):
            results = _in_hbm(one)
            read = [_in_hbm(inside[name]) for name in one.operands if name in inside]
            return results + sum(size / int(layers[1]) if size > results else size for size in read)
    body = _body(one, program)
    total = 0.0
    for index, name in enumerate(one.operands):
        operand = inside.get(name)
        if operand is None or operand.opcode in ("constant", "tuple"):
            continue
        read = _read(body, index, program)
        total += _in_hbm(operand) if read is None else min(read, _in_hbm(operand))
    named = {i.name: i for i in body}
    root = next((i for i in body if i.root), None)
    results = [named[n] for n in root.operands] if root and root.opcode == "tuple" else [root] if root else []
    if len(results) != len(one.shapes):
        return total + _in_hbm(one)
    return total + sum(
        _written(made, named) for made, shape in zip(results, one.shapes, strict=True) if not shape.on_chip
    )


def _written(made: Instruction, named: dict[str, Instruction]) -> float:
    """Bytes of a fusion's result that it writes: of one that is updated in place the update."""
    view = made
    while view.opcode == "bitcast" and view.operands[0] in named:
        view = named[view.operands[0]]
    update = named.get(view.operands[_IN_PLACE[view.opcode]]) if view.opcode in _IN_PLACE else None
    return update.bytes if update else made.bytes


def _body(one: Instruction, program: _Program) -> list[Instruction]:
    """Return what a fusion does; nothing for other instructions."""
    called = next((name for how, name in _CALLED.findall(one.rest) if how == "calls"), None)
    return program.computations.get(called, []) if one.opcode == "fusion" else []


def _read(body: list[Instruction], index: int, program: _Program) -> float | None:
    """Bytes that a fusion reads of its operand, where it takes slices alone; None where it takes all of it.

    What is only written into, in place, is not read.
    """
    names = {i.name for i in body if i.opcode == "parameter" and i.rest.startswith(f"parameter({index})")}
    total, is_read = 0.0, False
    for one in body:
        at = [operand for operand, name in enumerate(one.operands) if name in names]
        if not at:
            continue
        is_read = True
        if one.opcode == "bitcast":
            if one.root:  # all of it goes on to whoever reads the fusion
                return None
            names.add(one.name)
        elif one.opcode in _SLICES and at == [0]:
            total += one.bytes
        elif one.opcode == "fusion":
            inner = [_read(_body(one, program), operand, program) for operand in at]
            if None in inner:
                return None
            total += sum(inner)
        elif not (one.opcode in _IN_PLACE and at == [0]):
            return None
    return total if is_read else None


def _in_hbm(one: Instruction) -> float:
    return sum(shape.bytes for shape in one.shapes if not shape.on_chip)
