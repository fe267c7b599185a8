"""Copied layers are what peft would have made, and share nothing that one of them could change."""

import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

from hf_lora import attach_lora, load_lora, open_adapter, plan_lora, save_lora
from hf_lora.adapter import MODEL
from hf_lora.siblings import siblings_of
from hf_lora.testing import tiny
from hf_lora.walks import bare_modules
from tests.support import ALPHA, RANK, logits, randomise, tuner_layers


@pytest.fixture(params=["plain", "dora", "patterns"])
def saved(request, tmp_path):
    extra = {
        "plain": {},
        "dora": {"use_dora": True},
        "patterns": {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
    }[request.param]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **extra)
    return save_lora(randomise(attach_lora(tiny("llama"), config=config)), tmp_path)


def described(layer):
    """Class, plain attributes and structure of a tuner layer and all modules in it."""
    return {
        name: (
            type(module),
            {
                k: v
                for k, v in vars(module).items()
                if isinstance(v, int | float | str | bool) and k != "training"
            },
            {k: tuple(p.shape) for k, p in module._parameters.items() if p is not None},
        )
        for name, module in layer.named_modules()
    }


def test_a_load_makes_the_same_layers_as_plain_peft(saved):
    ours = tiny("llama")
    load_lora(ours, saved)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), saved).eval().get_base_model()
    twins = tuner_layers(theirs)
    assert tuner_layers(ours).keys() == twins.keys()
    for path, layer in tuner_layers(ours).items():
        twin = twins[path]
        assert described(layer) == described(twin), path
        for attribute in ("r", "lora_alpha", "scaling", "use_rslora", "merged_adapters"):
            assert getattr(layer, attribute) == getattr(twin, attribute), (path, attribute)
    assert torch.equal(logits(ours), logits(theirs))


def test_siblings_share_no_container_and_no_tensor(saved):
    model = tiny("llama")
    load_lora(model, saved)
    containers = [
        value
        for layer in tuner_layers(model).values()
        for module in layer.modules()
        for value in vars(module).values()
        if isinstance(value, dict | list | set)
    ]
    assert len({id(value) for value in containers}) == len(containers)
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    assert len({p.data_ptr() for p in factors}) == len(factors)


def test_a_second_adapter_and_a_hook_reach_one_layer_alone(saved):
    model = tiny("llama")
    load_lora(model, saved)
    first, second = list(tuner_layers(model).values())[:2]
    first.register_forward_hook(lambda *_: None)
    assert not second._forward_hooks
    attach_lora(model, name="more", targets=["layers.0.self_attn.q_proj"])
    assert [p for p, x in tuner_layers(model).items() if "more" in x.lora_A] == [
        "model.layers.0.self_attn.q_proj"
    ]


def _groups(model, file):
    found = siblings_of(dict(bare_modules(model)), open_adapter(file).components[MODEL])
    return found and found.groups


def test_few_layers_are_made_by_peft(saved):
    made = _groups(tiny("llama"), saved)
    assert sum(1 + len(others) for others in made.values()) == 14
    assert len(made) <= 7  # by shape, rank and alpha


@pytest.mark.parametrize("steer", ["hook", "forward", "class", "training"])
def test_a_layer_that_something_else_steers_is_left_to_peft(saved, steer):
    model = tiny("llama")
    layer = model.model.layers[0].self_attn.q_proj
    path = "model.layers.0.self_attn.q_proj"
    if steer == "hook":
        layer.register_forward_hook(lambda *_: None)
    elif steer == "forward":
        layer.forward = layer.forward
    elif steer == "class":
        layer.__class__ = type("Own", (nn.Linear,), {})
    else:
        layer.train(not layer.training)
    made = _groups(model, saved)
    if steer == "class":  # peft may look beyond a layer that it does not know
        assert made is None
        return
    assert made[path] == []
    assert not any(path in others for others in made.values())


def test_other_methods_and_fused_experts_are_left_to_peft(tmp_path):
    loha = attach_lora(tiny("llama"), config=peft.LoHaConfig(r=4))
    assert _groups(tiny("llama"), save_lora(loha, tmp_path / "loha")) is None
    moe = save_lora(attach_lora(tiny("qwen3_moe")), tmp_path / "moe")
    assert _groups(tiny("qwen3_moe"), moe) is None


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertModel", "ViTModel"])
def test_a_model_is_adapted_as_by_peft(name, meta):
    """The same tree, keys, flags, modes and configs, and of one seed the same values."""

    def built():
        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
        kind = getattr(transformers, name)
        with torch.device("meta" if meta else "cpu"):
            return kind(kind.config_class(**sizes)).eval()

    ours, theirs = built(), built()
    for adapter, options in (("a", {"r": 4}), ("b", {"r": 8, "use_rslora": True})):
        options |= {"lora_alpha": 11, "lora_dropout": 0.1}
        config = plan_lora(ours, config=peft.LoraConfig(**options)).config
        torch.manual_seed(1)
        attach_lora(ours, config=peft.LoraConfig(**options), name=adapter)
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft says that there is a first one
            peft.inject_adapter_in_model(config, theirs, adapter, low_cpu_mem_usage=meta)
        assert ours.peft_config[adapter].to_dict() == theirs.peft_config[adapter].to_dict()
        for layer in tuner_layers(theirs).values():
            layer.set_adapter([adapter])  # peft leaves the earlier ones trainable
    theirs.eval()  # peft makes its layers in training mode
    theirs._hf_peft_config_loaded = True  # as transformers' own `add_adapter` says
    assert ours.peft_config.keys() == theirs.peft_config.keys()
    own, other = (dict(m.named_modules()) for m in (ours, theirs))
    assert list(own) == list(other)
    for path, module in own.items():
        assert type(module) is type(other[path])
        assert module.training == other[path].training, path
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | list)}
        assert plain == {k: vars(other[path])[k] for k in plain}, path
        dicts = {k: v for k, v in vars(module).items() if k in ("r", "scaling", "lora_alpha")}
        assert dicts == {k: vars(other[path])[k] for k in dicts}
    parameters, others = (dict(m.named_parameters()) for m in (ours, theirs))
    assert list(parameters) == list(others)  # named once each: none is shared
    for key, parameter in parameters.items():
        assert parameter.requires_grad == others[key].requires_grad, key
        assert (parameter.dtype, parameter.shape) == (others[key].dtype, others[key].shape)
        assert meta or torch.equal(parameter, others[key]), key
