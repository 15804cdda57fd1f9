"""Pieces of work on several cores: each is done once, as one thread would do it; errors come out, watchers see all."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3lib.backends.cpu_attention import causal_attention, heads_at_once
from dsv3lib.backends.cpu_experts import experts_one_by_one
from dsv3lib.backends.side_by_side import WORTH_WAKING, side_by_side
from dsv3lib.layers.experts import sort_by_expert


@pytest.fixture(params=[1, 2, 3], autouse=True, scope="module")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def names_of(count, multiplications=WORTH_WAKING):
    """Who did each piece; all wait for one another where they may."""
    done = [None] * count
    meeting = threading.Barrier(min(count, torch.get_num_threads()) if multiplications >= WORTH_WAKING else 1)

    def piece(i):
        if i < meeting.parties:
            meeting.wait(10)
        assert done[i] is None and not torch.is_grad_enabled()
        done[i] = threading.current_thread().name, torch.get_num_threads()

    side_by_side(((lambda i=i: piece(i)) for i in range(count)), multiplications)
    return done


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_each_piece_is_done_once_and_all_threads_take_part(threads, count):
    done = names_of(count)
    assert all(done) and len({name for name, _ in done}) == min(count, threads)
    if min(count, threads) > 1:
        assert {inside for _, inside in done} == {1}
    assert torch.get_num_threads() == threads and torch.is_grad_enabled()


def test_little_work_wakes_nobody():
    assert {name for name, _ in names_of(5, WORTH_WAKING - 1)} == {threading.current_thread().name}


def test_what_a_piece_raises_comes_out(threads):
    done = []

    def piece(i):
        done.append(i)
        if i == 3:
            raise KeyError("the third")

    with pytest.raises(KeyError, match="the third"):
        side_by_side([lambda i=i: piece(i) for i in range(3, 50)], WORTH_WAKING)
    assert torch.get_num_threads() == threads and 3 in done
    assert threads > 1 or done == [3]  # who raises takes no other piece


def test_tensors_of_inference_mode_are_written():
    with torch.inference_mode():
        x = torch.zeros(4)
        side_by_side([lambda i=i: x[i].add_(i) for i in range(4)], WORTH_WAKING)
    assert x.tolist() == [0, 1, 2, 3]


def test_who_watches_operations_sees_all_of_them():
    class Watch(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += func is torch.ops.aten.mm.default
            return func(*args, **(kwargs or {}))

    a = torch.ones(3, 3)
    with Watch() as watch:
        side_by_side([lambda: torch.mm(a, a)] * 6, WORTH_WAKING)
    assert watch.seen == 6
    with torch.profiler.profile() as profile:
        side_by_side([lambda: torch.mm(a, a)] * 6, WORTH_WAKING)
    assert sum(e.count for e in profile.key_averages() if e.key == "aten::mm") == 6


def everything(seed, dtype=torch.float64):
    """Outputs and gradients of experts and attention that are large enough to wake threads."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    x, w_in, w_out = drawn(600, 64), drawn(5, 96, 64), drawn(5, 64, 48)
    indices = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(600)])
    weights = drawn(600, 3)
    y = experts_one_by_one(x, weights, w_in, w_out, sort_by_expert(indices, 5))
    q, k, v = drawn(7, 300, 24), drawn(7, 300, 24), drawn(7, 300, 16)
    o = causal_attention(q, k, v, 0.2)
    leaves = [x, weights, w_in, w_out, q, k, v]
    torch.autograd.backward([y, o], [drawn(*y.shape).detach(), drawn(*o.shape).detach()])
    return [y.detach(), o.detach(), *(leaf.grad for leaf in leaves)]


@given(seed=SEEDS)
def test_experts_and_attention_are_what_one_thread_makes_of_them(seed):
    found, threads = everything(seed), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = everything(seed)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 1e-11


def test_backward_may_have_another_number_of_threads_than_forward(threads):
    q = torch.randn(7, 300, 24, dtype=torch.float64, requires_grad=True)
    out = causal_attention(q, q, q, 0.2)
    torch.set_num_threads(4 - threads)
    (grad,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    torch.set_num_threads(threads)
    assert torch.allclose(grad, torch.autograd.grad(out.sum(), q)[0], atol=1e-12, rtol=0)


@given(n=st.integers(1, 200))
def test_groups_are_small_and_as_many_for_each_thread(n):
    each, threads = heads_at_once(n), torch.get_num_threads()
    count = -(-n // each)
    assert 1 <= each <= 24 and count <= -(-n // (24 * threads)) * threads
    assert each <= -(-n // threads)  # each thread has a group, where there are as many sequences
