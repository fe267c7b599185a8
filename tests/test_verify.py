"""The checks leave the base as it was, and a base is loaded as what the adapter was made for."""

import logging

import peft
import pytest
import torch
import transformers

from hf_lora import Adapter, attach_lora, load_lora, merge_lora, save_lora
from hf_lora.adapter import Component
from hf_lora.errors import AdapterNotFound, UnsupportedHost
from hf_lora.hosts import active_names, adapter_names, parts_of
from hf_lora.manifest import Manifest
from hf_lora.testing import tiny
from hf_lora.testing.pipelines import component_output, tiny_pipeline
from hf_lora.verify import load_base, verify
from tests.support import assert_same, logits, randomise, snapshot


@pytest.fixture
def style(tmp_path):
    pipe = tiny_pipeline("sd")
    for part in (pipe.unet, pipe.text_encoder):
        randomise(attach_lora(part, targets="attention"))
    return save_lora(pipe, tmp_path / "style.safetensors")


def states(rows):
    return {row.name: row.state for row in rows}


def adapter_for(task, *, host="", modules=None, **fields):
    """Returns an adapter without targets: what `load_base` looks at."""
    config = {"peft_type": "LORA", "task_type": task, **fields}
    return Adapter({"model": Component(config, {}, modules or {})}, Manifest(host=host))


def test_a_pipeline_passes_and_stays_as_it_was(style):
    pipe = tiny_pipeline("sd")
    before = {name: snapshot(part) for name, part in parts_of(pipe).items()}
    assert set(states(verify(style, base=pipe)).values()) == {"ok"}
    for name, part in parts_of(pipe).items():
        assert adapter_names(part) == []
        assert_same(before[name], snapshot(part))


def test_adapters_of_other_components_stay_active(style, tmp_path):
    pipe = tiny_pipeline("sd")
    load_lora(pipe, style, name="keep")
    other = tiny_pipeline("sd")
    attach_lora(other.unet, rank=2, name="unet_only")
    only = save_lora(other, tmp_path / "unet.safetensors", name="unet_only")
    before = component_output(pipe.text_encoder)
    assert set(states(verify(only, base=pipe)).values()) == {"ok"}
    assert [active_names(part) for part in parts_of(pipe).values()] == [("keep",), ("keep",)]
    assert torch.equal(component_output(pipe.text_encoder), before)


def test_an_adapter_that_does_not_fit_leaves_the_base_as_it_was(style):
    pipe = tiny_pipeline("sdxl")
    before = {name: snapshot(part) for name, part in parts_of(pipe).items()}
    assert states(verify(style, base=pipe))["fits"] == "failed"
    for name, part in parts_of(pipe).items():
        assert_same(before[name], snapshot(part))


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "without weights"])
def test_a_base_that_takes_no_adapter_now_leaves_its_checks_open(tmp_path, merged):
    model = randomise(attach_lora(tiny("llama")))
    path = save_lora(model, tmp_path / "adapter")
    base = merge_lora(model) if merged else tiny("llama", meta=True)
    rows = {row.name: row for row in verify(path, base=base)}
    assert [rows[name].state for name in ("digest", "fits", "base")] == ["ok", "open", "open"]
    assert ("merged into the weights" if merged else "has no weights") in rows["fits"].text


def test_targets_without_a_layer_fail(tmp_path):
    path = save_lora(attach_lora(tiny("bert")), tmp_path / "adapter")
    model = tiny("bert")
    del model.bert.encoder.layer[1]
    rows = {row.name: row for row in verify(path, base=model)}
    assert (rows["fits"].state, rows["base"].state) == ("failed", "open")
    assert "6 targets have no layer" in rows["fits"].text
    assert adapter_names(model) == []


def test_no_adapter_at_all_is_an_error(tmp_path):
    with pytest.raises(AdapterNotFound):
        verify(tmp_path, base=tiny("bert"))


def test_a_base_that_is_no_model_is_an_error_of_the_caller(style):
    with pytest.raises(UnsupportedHost, match="not the name"):
        verify(style, base="some/model")


def test_modules_that_replace_pretrained_ones_are_told(tmp_path):
    path = save_lora(attach_lora(tiny("llama"), train_also=["lm_head"]), tmp_path / "adapter")
    rows = {row.name: row for row in verify(path, base=tiny("llama"))}
    assert rows["fits"].state == "ok"
    assert "replaces pretrained modules: lm_head (3,072 values)" in rows["fits"].text


@pytest.mark.parametrize(
    ("family", "task", "kind"),
    [
        ("llama", "SEQ_CLS", "LlamaForSequenceClassification"),
        ("llama", "TOKEN_CLS", "LlamaForTokenClassification"),
        ("bert", "QUESTION_ANS", "BertForQuestionAnswering"),
        ("llama", "CAUSAL_LM", "LlamaForCausalLM"),
        ("llama", "FEATURE_EXTRACTION", "LlamaModel"),
        ("t5", "SEQ_2_SEQ_LM", "T5ForConditionalGeneration"),
        # what the task has no class for, or no task at all: the class that the base names
        ("llama", "SEQ_2_SEQ_LM", "LlamaForCausalLM"),
        ("bert", None, "BertForMaskedLM"),
    ],
)
def test_the_task_of_a_foreign_file_names_the_class(tmp_path, family, task, kind):
    tiny(family).save_pretrained(tmp_path)
    assert type(load_base(str(tmp_path), adapter_for(task))).__name__ == kind


def test_the_class_is_that_of_the_manifest_or_of_auto_mapping(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    kind = "BertForMultipleChoice"
    mapping = {"base_model_class": kind, "parent_library": "transformers.models.bert"}
    for adapter in (adapter_for("SEQ_CLS", host=kind), adapter_for(None, auto_mapping=mapping)):
        assert type(load_base(str(tmp_path), adapter)).__name__ == kind


@pytest.mark.parametrize("host", ["pipeline", "AutoTokenizer", "PreTrainedConfig", "no such"])
def test_a_manifest_names_models_only(tmp_path, host):
    tiny("llama").save_pretrained(tmp_path)
    base = load_base(str(tmp_path), adapter_for(None, host=host))
    assert type(base).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("host", ["", "RobertaForSequenceClassification"])
def test_a_classifier_has_as_many_labels_as_the_adapters_head(tmp_path, host):
    tiny("roberta", task="classifier").save_pretrained(tmp_path)  # three labels
    # 40 labels are more than the width of 32, so the smallest dimension is not the labels
    head = {"dense.weight": torch.zeros(32, 32), "out_proj.weight": torch.zeros(40, 32)}
    adapter = adapter_for("SEQ_CLS", host=host, modules={"classifier": head})
    base = load_base(str(tmp_path), adapter)
    assert (base.config.num_labels, base.classifier.out_proj.out_features) == (40, 40)


@pytest.mark.parametrize("shape", [(), (4,), (4, 7), (32, 32, 2)])
def test_odd_heads_change_no_labels(tmp_path, shape):
    tiny("llama").save_pretrained(tmp_path)
    adapter = adapter_for("SEQ_CLS", modules={"score": {"weight": torch.zeros(shape)}})
    assert load_base(str(tmp_path), adapter).config.num_labels == 2  # transformers' default


def test_a_class_that_meta_cannot_lay_out_is_loaded_as_the_base_has_it(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    tiny("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_config", fails)
    adapter = adapter_for("SEQ_CLS", modules={"score": {"weight": torch.zeros(3, 32)}})
    assert load_base(str(tmp_path), adapter).config.num_labels == 2


def test_a_base_none_of_whose_weights_is_used_is_refused(tmp_path):
    # its trunk is `transformer` where that of the language model is `model` (transformers 5.23)
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedHost, match="one of LlamaForQuestionAnswering"):
        load_base(str(tmp_path), adapter_for("QUESTION_ANS"))


def test_weights_that_neither_file_has_are_told(tmp_path, caplog):
    tiny("llama").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "hf_lora"):
        load_base(str(tmp_path), adapter_for("CAUSAL_LM"))
        head = {"score": {"weight": torch.zeros(2, 32)}}
        load_base(str(tmp_path), adapter_for("SEQ_CLS", modules=head))
        assert "values are random" not in caplog.text
        load_base(str(tmp_path), adapter_for("SEQ_CLS"))
    assert "has no score.weight: values are random" in caplog.text


def test_the_folder_of_an_adapter_is_no_base(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    path = save_lora(attach_lora(model), tmp_path / "adapter")
    with pytest.raises(UnsupportedHost, match="holds an adapter and no base") as caught:
        load_base(str(path), adapter_for("CAUSAL_LM"))
    assert repr(str(tmp_path / "base")) in caught.value.fix


@pytest.mark.parametrize("host", ["", "LlamaForCausalLM"])
def test_an_adapter_beside_a_base_is_not_loaded_with_it(tmp_path, host):
    plain = tiny("llama")
    plain.save_pretrained(tmp_path)
    expected = logits(plain)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(plain, config).save_pretrained(tmp_path)
    # what this works around: transformers loads it without being asked
    assert adapter_names(transformers.LlamaForCausalLM.from_pretrained(tmp_path)) == ["default"]
    base = load_base(str(tmp_path), adapter_for("CAUSAL_LM", host=host))
    assert adapter_names(base) == []
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_no_base(name):
    with pytest.raises(UnsupportedHost, match="empty name"):
        load_base(name, adapter_for("CAUSAL_LM"))


def test_an_error_without_text_is_told_by_its_class(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", fails)
    with pytest.raises(UnsupportedHost, match="RuntimeError"):
        load_base("user/base", adapter_for(None, host="LlamaForCausalLM"))


def test_the_revision_is_that_of_the_base(monkeypatch):
    asked = []

    def fails(name, **options):
        asked.append((name, options["revision"]))
        raise OSError("offline")

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", fails)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", fails)
    part = Component({"peft_type": "LORA"}, {})
    adapters = (adapter_for(None, host="LlamaForCausalLM"), Adapter({"unet": part}))
    for adapter in adapters:
        with pytest.raises(UnsupportedHost, match="offline"):
            load_base("user/base", adapter, revision="v2")
    assert asked == [("user/base", "v2")] * 2


def test_each_component_of_a_pipeline_keeps_its_dtype(tmp_path):
    pipe = tiny_pipeline("sd")
    pipe.unet.to(torch.float16)
    pipe.text_encoder.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    pipe.unet.to(torch.float32)
    # a variant lies beside the weights, and is not what is loaded
    pipe.unet.save_pretrained(tmp_path / "unet", variant="fp32")
    adapter = Adapter({"unet": Component({"peft_type": "LORA"}, {})})
    base = load_base(str(tmp_path), adapter)
    dtypes = (base.unet.dtype, base.text_encoder.dtype, base.vae.dtype)
    assert dtypes == (torch.float16, torch.bfloat16, torch.float32)
    base = load_base(str(tmp_path), adapter, dtype="float32")
    assert {base.unet.dtype, base.text_encoder.dtype} == {torch.float32}
