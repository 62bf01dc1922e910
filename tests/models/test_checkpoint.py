import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from masformer import AttentionPlan, BlockSpan, FullSpan, MasformerError, WindowSpan, apply_plan, load_model, save_model

PLAN = AttentionPlan((WindowSpan(5, 2), FullSpan(), BlockSpan(6, 1), WindowSpan(9)))
KINDS = ["llama", "qwen3", "gemma3_text", "olmo3", "gpt_neox", "gpt2"]


def tiny(kind):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 61}
    shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape |= {"attn_pdrop": 0.0} if kind == "gpt2" else {"intermediate_size": 48}
    if kind in ("llama", "qwen3", "gemma3_text", "olmo3"):
        shape |= {"num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_reloads_to_identical_logits_and_carries_its_plan(tmp_path, kind):
    model = apply_plan(tiny(kind), PLAN)
    tokens = torch.arange(3, 43)[None]
    save_model(model, tmp_path / "out")
    again, _ = load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert not torch.equal(tiny(kind)(tokens).logits, model(tokens).logits)
    save_model(again, tmp_path / "twice")
    assert AttentionPlan.from_dict(again.config.masformer) == PLAN
    assert (tmp_path / "twice/config.json").read_text() == (tmp_path / "out/config.json").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "twice"]


def test_wrong_values_are_named(tmp_path):
    with pytest.raises(MasformerError, match="the model has no plan"):
        save_model(tiny("llama"), tmp_path / "out")
    with pytest.raises(MasformerError, match="exists already"):
        save_model(apply_plan(tiny("llama"), PLAN), tmp_path)
    with pytest.raises(MasformerError, match=r"model file missing\.gguf does not exist"):
        load_model("missing.gguf")
