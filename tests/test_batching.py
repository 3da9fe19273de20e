"""Collating, cutting and the order of examples."""

import collections
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import random_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.batching import collate, common_prefix, micro_batches, pack
from minilora.data.dataset import IGNORE, Example
from minilora.data.sampler import Schedule, epoch_order, make_schedule

quick = settings(max_examples=60)


# ---------------------------------------------------------------------------------------- collate


def test_collate_shifts_by_one_within_each_example():
    """Read off the batch by the definition: at each row the token that follows in the row's own example."""
    examples = random_examples([5, 2, 9, 12])
    batch = collate(examples)
    assert batch.layout == ((4, 1, 8, 11), 0, 0)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, 24)
    assert {batch.input_ids.dtype, batch.position_ids.dtype, batch.rows.dtype, batch.targets.dtype} == {torch.int64}
    expected, start = [], 0
    for example in examples:
        length = len(example.input_ids) - 1
        assert batch.input_ids[0, start : start + length].tolist() == example.input_ids[:-1].tolist()
        assert batch.position_ids[0, start : start + length].tolist() == list(range(length))
        expected += [
            (start + t, int(example.input_ids[t + 1])) for t in range(length) if example.labels[t + 1] != IGNORE
        ]
        start += length
    assert list(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True)) == expected


def test_the_first_token_is_never_a_target_even_when_supervised():
    """With train_on_prompt all labels are set; the first token of the next example must not follow the last of this."""
    ids = np.arange(10, 16, dtype=np.int32)
    batch = collate([Example(ids[:3], ids[:3]), Example(ids[3:], ids[3:])])
    assert batch.input_ids[0, :4].tolist() == [10, 11, 13, 14]
    assert batch.rows.tolist() == [0, 1, 2, 3]
    assert batch.targets.tolist() == [11, 12, 14, 15]


@pytest.mark.parametrize("lengths", [[2], [8], [9], [10], [5, 2, 9, 13]])
def test_a_batch_is_filled_up_to_a_multiple_of_eight(lengths):
    batch = collate(random_examples(lengths))
    total = batch.input_ids.shape[1]
    assert total % 8 == 0
    assert total - sum(batch.layout.lengths) == batch.layout.padding < 8
    assert batch.position_ids.shape == (1, total)
    assert int(batch.rows.max()) < total - batch.layout.padding


def test_a_batch_moves_as_a_whole():
    batch = collate(random_examples([4, 6]))
    moved = batch.to(torch.device("meta"))
    assert moved.layout == batch.layout
    for name in ("input_ids", "position_ids", "rows", "targets"):
        assert getattr(moved, name).is_meta
        assert getattr(moved, name).shape == getattr(batch, name).shape


# ---------------------------------------------------------------------------------------- shared prefixes

small_examples = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=2, max_size=9), min_size=1, max_size=5
)


def from_pairs(pairs):
    """(token, supervised) pairs as an Example."""
    ids = np.array([token for token, _ in pairs], np.int32)
    return Example(ids, np.where([supervised for _, supervised in pairs], ids, IGNORE).astype(np.int32))


@settings(max_examples=200)
@given(small_examples)
def test_a_shared_prefix_is_what_all_begin_with_unsupervised(rows):
    """By the definition, token by token; two examples at least, and each keeps an input token of its own."""
    shared = 0
    while len(rows) > 1 and all(len(row) > shared + 2 for row in rows):
        here = [row[shared] for row in rows]
        if len(set(here)) > 1 or here[0][1]:
            break
        shared += 1
    assert common_prefix([from_pairs(row) for row in rows]) == shared


@settings(max_examples=200)
@given(small_examples)
def test_sharing_a_prefix_changes_no_context_and_no_target(rows):
    """What each supervised position has before it, and what is to follow, are the same with and without sharing."""
    examples = [from_pairs(row) for row in rows]

    def pairs(batch):
        found = []
        ids, positions, parts = batch.input_ids[0].tolist(), batch.position_ids[0].tolist(), list(batch.layout.parts())
        for row, target in zip(batch.rows.tolist(), batch.targets.tolist(), strict=True):
            (tokens, sees), *_ = [part for part in parts if part[0].start <= row < part[0].stop]
            context = [*range(batch.layout.prefix if sees else 0), *range(tokens.start, row + 1)]
            assert [positions[i] for i in context] == list(range(len(context)))
            found.append(([ids[i] for i in context], target))
        return found

    assert pairs(collate(examples, share_prefix=True)) == pairs(collate(examples))


@settings(max_examples=100)
@given(small_examples, st.integers(1, 40), st.booleans())
def test_micro_batches_compute_no_more_than_the_budget(rows, budget, share):
    """Counted after sharing: a long system prompt once left each row alone, with nobody to share it with."""
    examples = [from_pairs(row) for row in rows]
    batches = list(micro_batches(examples, budget, share))
    assert sum(len(batch.layout.lengths) for batch in batches) == len(examples)
    for batch in batches:
        computed = batch.input_ids.numel() - batch.layout.padding
        assert computed <= budget or len(batch.layout.lengths) == 1


def test_rows_with_a_long_prefix_share_it():
    prefix = [(i, False) for i in range(50)]
    examples = [from_pairs([*prefix, (100 + i, False), (200 + i, True)]) for i in range(6)]
    assert [len(batch.layout.lengths) for batch in micro_batches(examples, 60, True)] == [6]
    assert [len(batch.layout.lengths) for batch in micro_batches(examples, 60)] == [1] * 6


# ---------------------------------------------------------------------------------------- cut

lengths_and_budget = st.tuples(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100))


@quick
@given(lengths_and_budget)
def test_cut_is_a_partition_within_the_budget(case):
    lengths, budget = case
    bins = pack(lengths, budget)
    assert sorted(i for part in bins for i in part) == list(range(len(lengths)))
    for part in bins:
        assert part
        assert sum(lengths[i] for i in part) <= budget or len(part) == 1


@quick
@given(lengths_and_budget)
def test_cut_is_the_same_each_time_and_for_arrays(case):
    lengths, budget = case
    assert pack(lengths, budget) == pack(list(lengths), budget) == pack(np.asarray(lengths, dtype=np.int64), budget)


@quick
@given(lengths_and_budget)
def test_cut_wastes_little(case):
    """No two micro-batches could be one: what best fit promises."""
    lengths, budget = case
    loads = sorted(sum(lengths[i] for i in part) for part in pack(lengths, budget))
    assert all(a + b > budget for a, b in itertools.pairwise(loads))


def test_cut_takes_the_best_fit():
    """50 and 30 leave 10 and 30 of 60; the 10 goes where it fits exactly, so that another 30 still has room."""
    bins = pack([50, 30, 30, 10], 60)
    assert [sorted(part) for part in bins] == [[0, 3], [1, 2]]


# ---------------------------------------------------------------------------------------- order


@quick
@given(st.integers(0, 200), st.integers(0, 2**63), st.integers(0, 1000))
def test_an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch(count, seed, epoch):
    order = epoch_order(count, seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    np.random.seed(count)
    assert order.tolist() == epoch_order(count, seed, epoch).tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert tuple(range(50)) not in orders


@quick
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 3))
def test_a_schedule_takes_each_example_once_an_epoch(count, size, seed):
    schedule = Schedule(count, size, num_steps=10**6, seed=seed)
    for epoch in range(3):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        taken = [schedule.examples_of(step) for step in steps]
        assert sorted(np.concatenate(taken).tolist()) == list(range(count))
        assert all(len(part) == size for part in taken[:-1])
        assert len(taken[-1]) == count - size * (schedule.steps_per_epoch - 1)
        assert np.concatenate(taken).tolist() == epoch_order(count, seed, epoch).tolist()
        assert [schedule.ends_epoch(step) for step in steps] == [False] * (len(taken) - 1) + [True]


def test_the_last_step_ends_the_run_wherever_it_is():
    schedule = Schedule(num_examples=10, examples_per_step=4, num_steps=5, seed=0)
    assert [step for step in range(5) if schedule.ends_epoch(step)] == [2, 4]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(1, 0, 3), (2.5, 0, 8), (0.01, 0, 1), (10, 7, 7), (1, 100, 100)]
)
def test_how_many_steps_a_run_has(epochs, max_steps, expected):
    schedule = make_schedule(10, 4, epochs, max_steps, seed=0)
    assert schedule.steps_per_epoch == math.ceil(10 / 4)
    assert schedule.num_steps == expected


def test_a_long_run_sees_all_examples_equally_often():
    schedule = make_schedule(7, 3, 20, 0, seed=5)
    seen = collections.Counter(i for step in range(schedule.num_steps) for i in schedule.examples_of(step).tolist())
    assert set(seen.values()) == {20}
