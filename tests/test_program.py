"""Programs that run again in parts: what they run, from what, and what they must keep."""

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.planner.program import Instruction, Pack, Program, short_name

INPUT = 0


def op(
    *reads: int, to: int | tuple[int, ...], name: str = "aten.mul.Tensor", **facts: object
) -> Instruction:
    made = to if isinstance(to, tuple) else (to,)
    return Instruction("", name, reads, made, **facts)  # type: ignore[arg-type]


def packed_at_the_end(instructions: list[Instruction], *storages: int) -> Program:
    packs = [Pack(s, len(instructions)) for s in storages]
    return Program(instructions, packs, {INPUT})


def test_a_closure_stops_at_what_is_present() -> None:
    program = packed_at_the_end([op(0, to=1), op(1, to=2), op(2, to=3)], 1, 2, 3)
    assert program.closure(3, frozenset()) == (0, 1, 2)
    assert program.closure(3, frozenset({2})) == (2,)
    assert program.sources(3, frozenset()).storages == {INPUT}
    assert program.sources(3, frozenset({2})).storages == {2}


def test_what_nothing_asks_for_is_not_run() -> None:
    program = packed_at_the_end([op(0, to=1), op(0, to=2), op(1, 2, to=3), op(1, to=4)], 4)
    assert program.closure(4, frozenset()) == (0, 3)


def test_a_write_in_place_runs_on_a_fresh_storage_in_order() -> None:
    mask = [op(to=1), op(1, to=(), writes=(1,), random=True), op(1, to=(), writes=(1,))]
    program = packed_at_the_end([*mask, op(0, 1, to=2)], 1, 2)
    assert program.closure(2, frozenset()) == (0, 1, 2, 3)
    assert program.closure(2, frozenset({1})) == (3,)
    assert program.sources(2, frozenset()).random == {1}


def test_what_read_an_older_version_is_kept() -> None:
    program = packed_at_the_end([op(0, to=1), op(1, to=2), op(1, to=(), writes=(1,))], 1, 2)
    assert program.kept(()) == {2}
    assert program.kept({1}) == {1, 2}


def test_what_cannot_be_repeated_is_kept_but_not_what_follows_from_it() -> None:
    program = packed_at_the_end([op(0, to=1, once=True), op(1, to=2)], 1, 2)
    assert program.kept(()) == {1}


def test_a_tensor_from_nowhere_keeps_what_is_made_from_it() -> None:
    program = packed_at_the_end([op(7, to=1), op(0, to=2)], 1, 2)
    assert program.kept(()) == {1}


def test_the_state_of_the_generator_is_taken_at_the_last_pack_before() -> None:
    random = [op(0, to=1, random=True), op(1, to=2), op(2, to=3, random=True)]
    program = Program(random, [Pack(1, 1), Pack(2, 2), Pack(3, 3)], {INPUT})
    assert program.captured_at == {0: -1, 2: 1}


def test_a_random_op_right_after_another_cannot_be_reached_and_is_kept() -> None:
    random = [op(0, to=1, random=True), op(0, to=2, random=True)]
    program = packed_at_the_end(random, 1, 2)
    assert program.captured_at == {0: -1}
    assert program.kept(()) == {2}


def test_names_say_module_op_occurrence_and_result() -> None:
    program = Program(
        [
            Instruction("attn", "aten._scaled_dot_product_flash_attention.default", (0,), (1, 2)),
            Instruction("mlp.up", "aten.addmm.default", (1,), (3,)),
            Instruction("mlp.up", "aten.addmm.default", (3,), (4,)),
            Instruction("drop", "aten.empty_like.default", (), (5,)),
            Instruction("drop", "aten.bernoulli_.float", (5,), (), (5,), random=True),
            Instruction("drop", "aten.div_.Scalar", (5,), (), (5,)),
        ],
        [],
        {0},
    )
    assert program.names == {
        1: "attn.sdpa",
        2: "attn.sdpa[1]",
        3: "mlp.up.addmm",
        4: "mlp.up.addmm#2",
        5: "drop.bernoulli",
    }
    assert short_name("aten._safe_softmax.default") == "safe_softmax"


def test_a_probe_watches_the_ends_of_what_is_dropped() -> None:
    program = packed_at_the_end([op(0, to=1), op(1, to=2), op(0, to=3)], 1, 2, 3)
    assert program.probes(frozenset()) == (2, 3)
    assert program.probes(frozenset({2})) == (1, 3)


# -- against running it ---------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Chains of ops that read, allocate and write at random."""
    instructions: list[Instruction] = []
    storages = [INPUT]
    for _ in range(draw(st.integers(1, 9))):
        reads = tuple(draw(st.sets(st.sampled_from(storages), max_size=3)))
        if len(storages) > 1 and draw(st.integers(0, 3)) == 0:
            target = draw(st.sampled_from(storages[1:]))
            reads = tuple(dict.fromkeys((*reads, target)))
            instructions.append(op(*reads, to=(), writes=(target,)))
        else:
            made = tuple(len(storages) + i for i in range(draw(st.integers(1, 2))))
            instructions.append(op(*reads, to=made))
            storages += made
    saved = draw(st.lists(st.sampled_from(storages), max_size=6, unique=True))
    return packed_at_the_end(instructions, *saved)


def run(program: Program, indices: Collection[int], memory: dict[int, object]) -> None:
    """Runs instructions on symbolic values; reading what is not there is a KeyError.

    What is there stays, beside what is made again with another result, unless it is written to.
    """
    written = {s for i in indices for s in program.instructions[i].writes}
    there = memory.keys() - written
    for index in indices:
        instruction = program.instructions[index]
        read = tuple(memory[s] for s in instruction.reads)
        for storage in (*instruction.allocates, *instruction.writes):
            if storage not in there:
                memory[storage] = (index, storage, read)


@given(programs(), st.data())
def test_recomputing_repeats_the_forward(program: Program, data: st.DataObject) -> None:
    forward: dict[int, object] = {INPUT: "input"}
    run(program, range(len(program.instructions)), forward)
    wanted = data.draw(st.sets(st.sampled_from(program.droppable))) if program.droppable else set()
    kept = program.kept(wanted)
    assert wanted <= kept
    for storage in program.droppable:
        if storage in kept:
            continue
        others = [s for s in program.droppable if s not in kept and s != storage]
        alive = data.draw(st.sets(st.sampled_from(others))) if others else set()
        present = kept | frozenset(alive)
        memory = {s: forward[s] for s in (INPUT, *present)}
        run(program, program.closure(storage, present), memory)
        assert memory[storage] == forward[storage]
        sources = program.sources(storage, kept).storages
        memory = {s: forward[s] for s in sources}
        run(program, program.closure(storage, kept), memory)
        assert memory[storage] == forward[storage]


@pytest.mark.parametrize("keep", [(), (1,), (2,)])
def test_equal_programs_have_equal_keys(keep: tuple[int, ...]) -> None:
    first = packed_at_the_end([op(0, to=1), op(1, to=2)], 1, 2)
    second = packed_at_the_end([op(0, to=1), op(1, to=2)], 1, 2)
    assert first.key == second.key and hash(first.key) == hash(second.key)
    assert first.kept(keep) == second.kept(keep)
