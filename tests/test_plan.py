"""The plan: exact counts, every frozen layer with its reason, and nothing changed."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from hf_lora import attach_lora, plan_lora
from hf_lora.errors import UnsupportedTarget
from hf_lora.render import short
from hf_lora.testing import tiny
from tests.support import CLASSES, assert_same, snapshot


def _meta(name, **sizes):
    config = getattr(transformers, f"{name}Config")(**sizes)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        # Llama-2-7B, counts by arXiv 2106.09685's formula rank * (in + out) a matrix
        ({"targets": "qv", "rank": 8}, 4_194_304),
        ({"rank": 8}, 19_988_480),
        ({"rank": 16}, 39_976_960),
    ],
)
def test_llama_7b_counts_are_those_of_the_paper(options, parameters):
    plan = plan_lora(_meta("Llama", **LLAMA_7B), **options)
    assert plan.adapter_parameters == parameters
    assert plan.host_parameters == 6_738_415_616  # Llama-2-7B's published size


def test_roberta_base_with_rank_8_on_q_and_v_has_the_papers_count():
    with torch.device("meta"):
        model = transformers.RobertaForMaskedLM(transformers.RobertaConfig())
    assert plan_lora(model, rank=8, targets="qv").adapter_parameters == 294_912


@pytest.mark.parametrize(("family", "task"), CLASSES)
def test_the_planned_numbers_are_those_attached(family, task):
    model = tiny(family, task=task)
    before = snapshot(model)
    plan = plan_lora(model)
    assert_same(before, snapshot(model))
    attach_lora(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.trainable_parameters == trainable
    assert plan.host_parameters == sum(t.numel() for t in _distinct(tiny(family, task=task)))


def _distinct(model):
    return {id(p): p for p in model.parameters()}.values()


def test_a_plan_prints_roles_totals_and_what_stays_frozen():
    text = str(plan_lora(_meta("Llama", **LLAMA_7B)))
    assert "LoRA plan for LlamaForCausalLM: adapter 'default', rank 16, alpha 32" in text
    assert "attn.q              32 targets  (4096->4096)" in text
    assert "4.19 M parameters" in text
    assert "Trainable: 0.59 % of 6.74 B parameters" in text
    # 39,976,960 values: 4 bytes of gradient, 8 of AdamW's two moments each
    assert "adds 159.9 MB of gradients and 319.8 MB for AdamW" in text
    assert "language-model head" in text
    assert len(text.splitlines()) < 20


def test_the_plan_in_the_docs_is_the_plan_of_that_model():
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
             "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "tie_word_embeddings": True}  # fmt: skip
    page = (Path(__file__).parent.parent / "docs" / "attach.md").read_text(encoding="utf-8")
    assert str(plan_lora(_meta("Llama", **sizes))) in page


def test_frozen_experts_are_counted_and_named():
    plan = plan_lora(tiny("qwen3_moe"))
    assert any("49 % of the parameters lie in fused experts" in note for note in plan.notes)
    reasons = {f.what: f.reason for f in plan.frozen}
    assert reasons["moe.experts.gate_up"].startswith("fused experts, opt-in")


def test_a_plan_is_plain_data_for_json():
    plan = plan_lora(tiny("bert", task="classifier"), rank=4, name="style")
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["heads"] == {"classifier": 99}  # 32 x 3 + 3
    assert data["rank"] == 4
    assert data["alpha"] == 32
    assert data["task_type"] == "SEQ_CLS"
    assert data["roles"]["attn.q"]["parameters"] == 2 * 4 * 64
    assert len(data["roles"]["attn.q"]["targets"]) == 2
    assert data["trainable_parameters"] == data["adapter_parameters"] + 99


def test_targets_by_role_prefix_and_trailing_name():
    model = tiny("t5")
    assert set(plan_lora(model, targets="cross_attn").by_role()) == {
        f"cross_attn.{part}" for part in "qkvo"
    }
    both = plan_lora(model, targets=["attn.q", "DenseReluDense.wo"])
    assert set(both.by_role()) == {"attn.q", "mlp.down"}
    one = plan_lora(model, targets=["encoder.block.1.layer.0.SelfAttention.v"])
    assert len(one.targets) == 1


def test_all_linear_takes_blocks_but_no_head_and_no_router():
    plan = plan_lora(tiny("deberta-v2"), targets="all-linear")
    assert all("encoder.layer." in t.path for t in plan.targets)
    moe = plan_lora(tiny("qwen3_moe"), targets="all-linear")
    assert not any(t.path.endswith("gate") for t in moe.targets)


def test_convolutions_and_embeddings_count_their_own_shapes():
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Linear(6, 6))
    plan = plan_lora(net, targets=["0"], rank=2)
    assert plan.adapter_parameters == 2 * (4 * 9 + 6)
    grouped = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.Linear(6, 6))
    assert plan_lora(grouped, targets=["0"], rank=2).adapter_parameters == 2 * 4 * 9 + 6 * 2 // 2
    words = plan_lora(tiny("llama"), targets=["embed_tokens"], rank=2)
    assert words.adapter_parameters == 2 * (96 + 32)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_planned_convolutions_are_those_attached(groups):
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=groups), torch.nn.Linear(6, 6))
    plan = plan_lora(net, targets=["0"], rank=2)
    attach_lora(net, targets=["0"], rank=2)
    assert plan.adapter_parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)


def test_methods_other_than_lora_have_no_count():
    plan = plan_lora(tiny("llama"), config=peft.LoHaConfig(r=4))
    assert plan.rank is None
    assert plan.alpha is None
    assert plan.adapter_parameters == 0
    assert "LOHA plan" in str(plan)


def test_dora_counts_its_magnitudes():
    model = tiny("llama")
    config = peft.LoraConfig(r=4, use_dora=True)
    plan = plan_lora(model, config=config)
    attach_lora(model, config=config)
    assert plan.adapter_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_large_numbers_are_short():
    wanted = {960: "960", 9_999: "9,999", 39_300: "39.3 k", 1_570_000: "1.57 M", 6.74e9: "6.74 B"}
    assert {n: short(int(n)) for n in wanted} == wanted


class _Convolutions(torch.nn.Module):
    """Blocks whose convolution is called as a role of diffusion models begins."""

    def __init__(self, **options):
        super().__init__()
        blocks = [torch.nn.ModuleDict({"conv": torch.nn.Conv2d(4, 4, 3, **options)}) for _ in "ab"]
        self.blocks = torch.nn.ModuleList(blocks)


def test_a_module_name_that_is_a_role_of_other_models_is_a_name_here():
    plan = plan_lora(_Convolutions(padding=1), rank=2, targets=["conv"])
    assert [t.path for t in plan.targets] == ["blocks.0.conv", "blocks.1.conv"]


def test_a_dilated_convolution_cannot_be_adapted():
    """peft 0.21.2 gives A the stride and padding of the base, and not its dilation."""
    with pytest.raises(UnsupportedTarget, match="leaves the dilation out"):
        plan_lora(_Convolutions(padding=2, dilation=2), rank=2, targets=["conv"])
