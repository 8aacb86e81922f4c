import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puretrain import random
from puretrain.errors import ConfigurationError, StructureError

words = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # known answers of the Random123 distribution, threefry2x32 with 20 rounds
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_known_answers(key, counter, expected):
    data = (counter[0] << 32) | counter[1]
    assert random.fold_in(torch.tensor(key), data).tolist() == list(expected)


def test_keys_equal_those_of_jax():
    # printed by jax.random.key_data(jax.random.split(jax.random.key(0)))
    assert random.split(random.key(0)).tolist() == [
        [1797259609, 2579123966],
        [928981903, 3453687069],
    ]


@given(words, words, st.lists(words, min_size=1, max_size=5))
def test_tensors_and_integers_give_the_same_keys(first, second, data):
    key = torch.tensor([first, second])
    one_by_one = torch.stack([random.fold_in(key, number) for number in data])
    assert torch.equal(random.fold_in(key, torch.tensor(data)), one_by_one)
    mapped = torch.func.vmap(random.fold_in, (None, 0))(key, torch.tensor(data))
    assert torch.equal(mapped, one_by_one)
    assert torch.equal(random.split(key, 3), random.fold_in(key, torch.arange(3)))


def test_split_under_vmap_and_with_leading_dimensions():
    keys = random.split(random.key(3), 4)
    expected = torch.stack([random.split(key, 2) for key in keys])
    assert torch.equal(torch.func.vmap(random.split)(keys), expected)
    assert torch.equal(random.split(keys, 2).transpose(0, 1), expected)


def test_streams_are_independent_of_each_other():
    key = random.key(7)
    names = ["dropout", "noise", "augmentation"]
    assert len({tuple(random.stream(key, name).tolist()) for name in names}) == 3
    assert torch.equal(random.stream(key, "noise"), random.stream(key, "noise"))


def test_scope_is_a_function_of_the_key_and_restores():
    before = torch.get_rng_state()
    draws = []
    for seed in (1, 2, 1):
        torch.rand(seed)  # whatever ran before
        outside = torch.get_rng_state()
        with random.scope(random.key(seed)):
            draws.append(
                (torch.rand(3), torch.nn.functional.dropout(torch.ones(9)), torch.randperm(5))
            )
        assert torch.equal(torch.get_rng_state(), outside)
    torch.set_rng_state(before)
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[2], strict=True))
    assert not torch.equal(draws[0][0], draws[1][0])


def test_scope_restores_after_an_exception():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), random.scope(random.key(1)):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_scopes_nest():
    with random.scope(random.key(1)):
        expected = torch.rand(2)
    with random.scope(random.key(1)):
        first = torch.rand(1)
        with random.scope(random.key(2)):
            torch.rand(5)
        second = torch.rand(1)
    assert torch.equal(torch.cat([first, second]), expected)


def test_generator_draws_what_the_scope_draws():
    key = random.fold_in(random.key(5), 6)
    with random.scope(key):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4, generator=random.generator(key)), inside)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, "1"])
def test_bad_seeds(seed):
    with pytest.raises(ConfigurationError, match="64 bits"):
        random.key(seed)


def test_negative_and_large_seeds():
    assert random.key(-1).tolist() == [0xFFFFFFFF, 0xFFFFFFFF]
    assert random.key(2**32 + 5).tolist() == [1, 5]


@pytest.mark.parametrize("bad", [torch.zeros(2), torch.zeros(3, dtype=torch.int64), 7])
def test_what_is_no_key_is_refused(bad):
    with pytest.raises(StructureError, match="a key is int64"):
        random.fold_in(bad, 1)
    with pytest.raises(StructureError, match="a key is int64"), random.scope(bad):
        pass
