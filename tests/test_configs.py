"""What is found out about a config is found out once."""

import pytest

from masformer.configs import once_per_config
from tiny import tiny_config


@pytest.fixture
def asked():
    """A function that is asked once per config, and what it was asked for."""
    seen = []
    return once_per_config(lambda config: seen.append(config) or len(seen)), seen


def test_a_config_is_the_same_wherever_it_came_from_and_whatever_its_weights_are_stored_in(asked):
    find, seen = asked
    first, second = tiny_config("llama"), tiny_config("llama")
    second.name_or_path, second.architectures, second.dtype = "elsewhere", ["LlamaForCausalLM"], "bfloat16"
    assert find(first) == find(second) == 1
    assert len(seen) == 1


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"rms_norm_eps": 1e-3}, {"a_key_of_mine": 1}])
def test_a_config_that_says_something_else_is_asked_for_anew(asked, change):
    find, _ = asked
    config = tiny_config("llama")
    find(config)
    for name, value in change.items():
        setattr(config, name, value)
    assert find(config) == 2
    assert find(tiny_config("mistral")) == 3


def test_an_error_is_not_kept():
    answers = iter([ValueError("not yet"), "found"])

    def find(config):
        if isinstance(answer := next(answers), ValueError):
            raise answer
        return answer

    once = once_per_config(find)
    with pytest.raises(ValueError, match="not yet"):
        once(tiny_config("llama"))
    assert once(tiny_config("llama")) == "found"
