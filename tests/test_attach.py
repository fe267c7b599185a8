"""Attach and detach: the right layers, trained by anyone's loop, gone without a trace."""

import copy
import pickle
import warnings

import accelerate
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hf_lora import (
    Family,
    attach_lora,
    base_model,
    detach_lora,
    load_lora,
    merge_lora,
    plan_lora,
    register_family,
    save_lora,
    set_adapters,
    unmerge_lora,
)
from hf_lora.errors import (
    AdapterNotFound,
    InvalidOption,
    MetaHost,
    TargetNotFound,
    UnsupportedHost,
    UnsupportedTarget,
)
from hf_lora.families import unregister_family
from hf_lora.hosts import active_names
from hf_lora.record import record_of
from hf_lora.testing import tiny, tiny_batch
from hf_lora.testing.pipelines import tiny_pipeline
from tests.support import (
    ALPHA,
    CLASSES,
    RANK,
    assert_same,
    logits,
    randomise,
    snapshot,
    tuner_layers,
)


class ToyBlock(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        for name in ("seek", "tag", "gist", "blend"):
            setattr(self, name, nn.Linear(width, width))
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        mixed = nn.functional.scaled_dot_product_attention(self.seek(x), self.tag(x), self.gist(x))
        x = x + self.blend(mixed)
        return x + self.shrink(self.grow(x).relu())


class Toy(nn.Module):
    """A small transformer in which no layer has a name that a library uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(8, 16)
        self.floors = nn.ModuleList(ToyBlock() for _ in range(2))

    def forward(self, ids):
        x = self.words(ids)
        for floor in self.floors:
            x = floor(x)
        return x


class Blocks(nn.Module):
    """A model of nobody's library: blocks with names the lexicon knows in part."""

    def __init__(self, names=("q_proj", "up_proj", "wobble")):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(8, 8) for n in names}) for _ in range(3)
        )
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            for layer in block.values():
                x = x + layer(x)
        return self.out(x)


def _steps(model):
    """A plain training loop, 20 steps of AdamW; returns the loss before and after."""
    batch = tiny_batch(model)
    rows = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(rows or list(model.parameters()), lr=1e-2)
    losses = []
    for _ in range(21):  # the last one only to see the loss after the 20th step
        loss = model(**batch).loss
        losses.append(loss.item())
        if rows:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1]


@pytest.mark.parametrize(("family", "task"), CLASSES)
def test_twenty_steps_lower_the_loss_and_leave_every_base_tensor(family, task):
    model = tiny(family, task=task)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    untouched = logits(model)
    attach_lora(model, rank=RANK, alpha=ALPHA)
    assert torch.equal(logits(model), untouched)  # B is zero
    start, end = _steps(model)
    assert end < 0.98 * start
    detach_lora(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(logits(model), untouched)


@pytest.mark.parametrize(("family", "task"), CLASSES)
def test_the_same_run_with_the_adapter_frozen_changes_nothing(family, task):
    model = attach_lora(tiny(family, task=task), rank=RANK, alpha=ALPHA)
    model.requires_grad_(False)
    start, end = _steps(model)
    assert start == end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_detach_restores_parameters_flags_mode_and_outputs(family, dtype):
    model = tiny(family).to(dtype)
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    before, outputs = snapshot(model), logits(model)
    attach_lora(model, rank=RANK, alpha=ALPHA)
    randomise(model)
    model.eval()
    assert not torch.equal(logits(model), outputs)
    assert detach_lora(model) is model
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), outputs)


def test_attach_gives_back_the_same_object_that_trainer_and_generate_know():
    model = tiny("llama")
    assert attach_lora(model) is model
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert model.active_adapters() == ["default"]
    assert model._hf_peft_config_loaded
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    generated = model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 5)


def test_only_the_adapter_and_the_head_are_trainable():
    model = attach_lora(tiny("bert", task="classifier"))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "classifier.modules_to_save" in n for n in trainable)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == (
        plan_lora(tiny("bert", task="classifier")).trainable_parameters
    )


def test_trainer_trains_and_saves_the_adapter_alone(tmp_path):
    model = attach_lora(tiny("llama"))
    rows = [{k: v[0] for k, v in tiny_batch(model).items()}] * 8
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names


def test_gradients_flow_with_gradient_checkpointing():
    model = attach_lora(tiny("llama")).train()
    # transformers 5.23 renamed it
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    model(**tiny_batch(model)).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(grads) == 14
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_dropout_rests_in_an_evaluating_model_and_runs_in_a_training_one():
    model = randomise(attach_lora(tiny("llama"), dropout=0.5))
    assert torch.equal(model(**tiny_batch(model)).logits, model(**tiny_batch(model)).logits)
    assert not any(m.training for m in model.modules())
    model = randomise(attach_lora(tiny("llama").train(), dropout=0.5))
    assert not torch.equal(model(**tiny_batch(model)).logits, model(**tiny_batch(model)).logits)


def test_half_precision_models_get_float32_factors():
    model = attach_lora(tiny("llama").to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(**tiny_batch(model)).logits.dtype == torch.bfloat16


def test_the_rank_is_capped_at_the_smaller_side_and_said():
    model = tiny("llama")
    plan = plan_lora(model, rank=24)
    ranks = {t.path: t.rank for t in plan.targets}
    assert ranks["model.layers.0.self_attn.k_proj"] == 16  # 32 -> 16
    assert ranks["model.layers.0.mlp.up_proj"] == 24
    assert any("capped" in note for note in plan.notes)
    attach_lora(model, rank=24)
    layer = tuner_layers(model)["model.layers.1.self_attn.v_proj"]
    assert layer.lora_A["default"].weight.shape == (16, 32)
    assert layer.scaling["default"] == 32 / 16  # alpha stays, as alpha/rank is what is fixed


def test_attaching_matches_its_plan_layer_by_layer():
    for family, task in CLASSES:
        model = tiny(family, task=task)
        plan = plan_lora(model)
        attach_lora(model)
        assert set(tuner_layers(model)) == {t.path for t in plan.targets}


def test_a_config_keeps_its_options_and_gets_targets():
    config = peft.LoraConfig(r=4, lora_alpha=11, use_dora=True)
    model = attach_lora(tiny("llama"), config=config, targets="attention")
    assert config.target_modules is None  # the caller's object is not touched
    layers = tuner_layers(model)
    assert {n.split(".")[-1] for n in layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(layer.use_dora["default"] for layer in layers.values())


def test_detaching_dora_leaves_the_layers_of_other_adapters_as_they_were():
    model = attach_lora(tiny("llama"), name="mine", targets="attention")
    before = snapshot(model)
    dora = peft.LoraConfig(use_dora=True, target_modules=["q_proj"])
    for name in ("first", "second"):
        attach_lora(model, config=dora, name=name)
    for name in ("second", "first"):
        detach_lora(model, name)
    assert_same(before, snapshot(model))


def test_a_config_with_excluded_layers_is_obeyed():
    config = peft.LoraConfig(layers_to_transform=[1], exclude_modules=["down_proj"])
    layers = tuner_layers(attach_lora(tiny("llama"), config=config))
    assert len(layers) == 6
    assert all("layers.1." in n and "down_proj" not in n for n in layers)


def test_a_config_with_an_expression_means_what_peft_means():
    config = peft.LoraConfig(target_modules=r".*\.1\..*(q|v)_proj")
    layers = tuner_layers(attach_lora(tiny("llama"), config=config))
    assert set(layers) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    }


def test_a_model_inside_a_peft_model_is_adapted_and_seen_by_it():
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    before = snapshot(theirs)
    assert attach_lora(theirs, name="ours", targets="mlp") is theirs
    assert list(theirs.peft_config) == ["default", "ours"]
    assert theirs.active_adapters == ["ours"]
    randomise(theirs)
    assert torch.equal(logits(theirs), logits(theirs.get_base_model()))
    detach_lora(theirs, "ours")
    after = snapshot(theirs)
    assert theirs.active_adapters == ["default"]
    assert before["requires_grad"] == after["requires_grad"]
    assert before["tensors"].keys() == after["tensors"].keys()


def test_a_second_adapter_rests_on_the_first_and_leaves_without_it():
    model = tiny("llama")
    bare = logits(model)
    randomise(attach_lora(model, name="first", targets="attention"))
    first = logits(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    randomise(attach_lora(model, name="second"), seed=6)
    assert model.active_adapters() == ["second"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".first." in n)
    detach_lora(model, "second")
    assert model.active_adapters() == ["first"]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert len(tuner_layers(model)) == 8  # the mlp layers are bare again
    assert torch.equal(logits(model), first)
    detach_lora(model)
    assert torch.equal(logits(model), bare)


def test_the_first_of_two_leaves_and_the_base_stays_frozen():
    model = tiny("llama")
    before = snapshot(model)
    attach_lora(model, name="first")
    attach_lora(model, name="second")
    detach_lora(model, "first")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".second." in n for n in trainable)
    detach_lora(model, "second")
    assert_same(before, snapshot(model))


def test_detaching_the_active_one_activates_one_that_is_left():
    model = tiny("llama")
    attach_lora(model, name="first")
    attach_lora(model, name="second")
    set_adapters(model, "first")
    detach_lora(model, "first")
    assert model.active_adapters() == ["second"]


def test_an_adapter_over_one_of_transformers_leaves_no_record():
    model = tiny("llama")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    attributes = {n: set(vars(m)) for n, m in tiny("llama").named_modules()}
    attach_lora(model, name="ours")
    detach_lora(model)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes


def test_an_adapter_of_transformers_detaches_too():
    model = tiny("llama")
    bare = logits(model)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    randomise(model)
    detach_lora(model)
    assert torch.equal(logits(model), bare)
    assert not tuner_layers(model)


def test_a_copied_host_detaches_on_its_own():
    model = randomise(attach_lora(tiny("llama")))
    twin = copy.deepcopy(model)
    with_adapter = logits(model)
    detach_lora(twin)
    assert not tuner_layers(twin)
    assert torch.equal(logits(model), with_adapter)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), with_adapter)
    assert torch.equal(logits(detach_lora(again)), logits(twin))


def test_a_plain_module_gets_the_layers_whose_roles_are_known(tmp_path):
    model = Blocks()
    plan = plan_lora(model)
    assert set(plan.by_role()) == {"attn.q", "mlp.up"}
    assert [(f.what, f.reason) for f in plan.frozen if "wobble" in f.what] == [
        ("blocks.wobble", "unknown role; name it to target it")
    ]
    x = torch.randn(2, 8)
    bare = model(x)
    randomise(attach_lora(model))
    assert not torch.equal(model(x), bare)
    save_lora(model, tmp_path)
    assert torch.equal(detach_lora(model)(x), bare)


def test_a_model_with_fresh_names_gets_all_linears_of_its_blocks_and_a_note():
    plan = plan_lora(Blocks(names=("alpha1", "beta2")))
    assert len(plan.targets) == 6
    assert {t.role for t in plan.targets} == {"unknown"}
    assert "no layer name is known" in plan.notes[0]
    named = plan_lora(Blocks(names=("alpha1", "beta2")), targets=["beta2"])
    assert [t.path for t in named.targets] == [f"blocks.{i}.beta2" for i in range(3)]


@pytest.mark.parametrize("by", ["names", "family"])
def test_a_toy_transformer_with_fresh_names_works_when_names_are_given(by, tmp_path):
    """Queries and so on under names that no library uses: seek, tag, gist, blend, grow, shrink."""
    names = {"attn.q": "seek", "attn.k": "tag", "attn.v": "gist", "attn.o": "blend"}
    with_mlp = {**names, "mlp.up": "grow", "mlp.down": "shrink"}
    unknown = plan_lora(Toy())
    assert {t.role for t in unknown.targets} == {"unknown"}
    assert "no layer name is known" in unknown.notes[0]
    if by == "family":
        row = register_family(Family("toy", classes=("Toy",), roles=with_mlp, source="this test"))
        request = "default"
    else:
        row, request = None, list(with_mlp.values())
    try:
        plan = plan_lora(Toy(), targets=request)
        assert plan.by_role().keys() == (with_mlp.keys() if row else {"unknown"})
        assert len(plan.targets) == 12
        assert not plan.notes
        model, ids = attach_lora(Toy(), targets=request), torch.arange(5)[None]
        model(ids).sum().backward()
        assert all(p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)
        outputs = randomise(model).eval()(ids)
        host = Toy().eval()
        load_lora(host, save_lora(model, tmp_path))
        assert torch.equal(host(ids), outputs)
    finally:
        if row:
            unregister_family(row)


def test_layers_that_torch_bypasses_are_left_out_with_the_reason():
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
    with pytest.raises(Exception, match="inference fast path"):
        attach_lora(model, targets=["linear1"])
    reasons = {f.reason for f in plan_lora(nn.Sequential(model[0], nn.Linear(8, 8))).frozen}
    assert any("fast path" in r for r in reasons)
    assert any("MultiheadAttention" in r for r in reasons)


def test_train_also_adds_names_or_nothing():
    model = tiny("llama")
    plan = plan_lora(model, train_also=["lm_head"])
    assert [h.path for h in plan.heads] == ["lm_head"]
    attach_lora(model, train_also=["lm_head"])
    assert model.lm_head.modules_to_save["default"].weight.requires_grad
    none = attach_lora(tiny("bert", task="classifier"), train_also=())
    assert not any("modules_to_save" in n for n, _ in none.named_parameters())


def test_a_meta_host_is_planned_and_attached_but_not_trained():
    model = tiny("llama", meta=True)
    plan = plan_lora(model)
    assert plan.adapter_parameters == plan_lora(tiny("llama")).adapter_parameters
    before = snapshot(model)
    attach_lora(model).train()
    assert all(p.is_meta for p in model.parameters())
    batch = {k: v.to("meta") for k, v in tiny_batch(model).items()}
    with pytest.raises(MetaHost, match="cannot be trained"):
        model(**batch)
    with pytest.raises(MetaHost, match="cannot be saved"):
        save_lora(model, "nowhere")
    with pytest.raises(MetaHost, match="cannot be merged"):
        merge_lora(model)
    detach_lora(model)
    after = snapshot(model)
    assert before["attributes"] == after["attributes"]
    assert before["hooks"] == after["hooks"]


def test_base_model_runs_without_adapters_and_puts_everything_back():
    model = tiny("bert", task="classifier")
    bare = logits(model)
    randomise(attach_lora(model))
    adapted, flags = logits(model), snapshot(model)["requires_grad"]
    with base_model(model) as inner:
        assert inner is model
        assert torch.equal(logits(model), bare)
        with base_model(model):
            assert torch.equal(logits(model), bare)
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), adapted)
    assert snapshot(model)["requires_grad"] == flags
    with pytest.raises(RuntimeError, match="inside"), base_model(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), adapted)


def test_base_model_unmerges_for_the_block():
    model = tiny("llama")
    bare = logits(model)
    randomise(attach_lora(model))
    merge_lora(model)
    merged = logits(model)
    with base_model(model):
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), merged)
    unmerge_lora(model)


def test_detach_unmerges_first():
    model = tiny("llama")
    before = snapshot(model)
    randomise(attach_lora(model))
    merge_lora(model)
    detach_lora(model)
    assert_same(before, snapshot(model))


def test_detach_of_what_is_not_there_is_an_error():
    with pytest.raises(AdapterNotFound, match="has no adapter 'default'. It has none"):
        detach_lora(tiny("llama"))
    model = attach_lora(tiny("llama"), name="style")
    with pytest.raises(AdapterNotFound, match="It has 'style'"):
        detach_lora(model, "styl")


def test_the_last_adapter_of_a_peft_model_is_not_torn_out():
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedHost, match="get_base_model"):
        detach_lora(theirs)
    attach_lora(theirs, name="ours")
    with pytest.raises(UnsupportedHost, match="every adapter"):
        detach_lora(theirs)
    detach_lora(theirs.get_base_model())
    assert not tuner_layers(theirs)


def test_attaching_to_a_host_whose_adapters_are_disabled_takes_effect_and_is_undone():
    model = tiny("llama")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    randomise(model)
    model.disable_adapters()
    bare = logits(model)
    randomise(attach_lora(model, name="ours", targets="qv"), seed=6)
    assert not torch.equal(logits(model), bare)
    detach_lora(model, "ours")
    assert torch.equal(logits(model), bare)  # disabled, as before
    model.enable_adapters()
    assert not torch.equal(logits(model), bare)


def test_none_active_stays_none_active():
    model = attach_lora(tiny("llama"), name="first")
    set_adapters(model, [])
    bare = logits(model)
    randomise(attach_lora(model, name="second"))
    detach_lora(model, "second")
    assert model.active_adapters() == []
    assert torch.equal(logits(model), bare)


def test_two_methods_on_one_layer_are_refused():
    ia3 = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = attach_lora(tiny("llama"), config=ia3, name="ia3")
    before = snapshot(model)
    with pytest.raises(UnsupportedTarget, match=r"k_proj already has an adapter of another meth"):
        attach_lora(model, name="lora")
    assert_same(before, snapshot(model))
    attach_lora(model, name="lora", targets=["q_proj"])


def test_parameters_are_targets_of_the_plan(tmp_path):
    config = peft.LoraConfig(r=4, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    plan = plan_lora(tiny("qwen3_moe"), config=config)
    assert set(plan.by_role()) == {"moe.experts.gate_up", "moe.experts.down"}
    model = attach_lora(tiny("qwen3_moe"), config=config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.adapter_parameters == trainable
    with pytest.raises(TargetNotFound, match=r"matches 'experts\.nope'"):
        attach_lora(
            tiny("qwen3_moe"),
            config=peft.LoraConfig(target_parameters=["experts.gate_up_proj", "experts.nope"]),
        )


def test_one_layer_in_two_places_is_refused_and_one_block_in_two_places_works():
    layer = nn.Linear(8, 8)
    twice = nn.Sequential(nn.ModuleDict({"q_proj": layer}), nn.ModuleDict({"q_proj": layer}))
    with pytest.raises(UnsupportedTarget, match="shared by 2 modules"):
        attach_lora(twice, targets=["q_proj"])

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.q_proj(x)

    block = Block()
    model, x = nn.Sequential(block, block), torch.randn(2, 8)
    bare = model(x)
    randomise(attach_lora(model, targets=["q_proj"]))
    assert not torch.equal(model(x), bare)
    assert torch.equal(detach_lora(model)(x), bare)


def test_a_data_parallel_host_is_the_model_inside(tmp_path):
    wrapped = nn.DataParallel(tiny("llama"))
    assert attach_lora(wrapped) is wrapped
    randomise(wrapped)
    save_lora(wrapped, tmp_path)
    fresh = tiny("llama")
    load_lora(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(wrapped.module))


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (
            lambda m: peft.get_peft_model(
                m, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
            ),
            "holds prompts",
        ),
        (
            lambda m: peft.get_peft_model(
                m, peft.LoraConfig(target_modules=["q_proj"]), mixed=True
            ),
            "several methods",
        ),
    ],
)
def test_hosts_of_peft_that_hold_other_things_are_refused(wrap, words):
    with pytest.raises(UnsupportedHost, match=words):
        attach_lora(wrap(tiny("llama")), name="ours")


def test_a_host_partly_on_meta_is_refused():
    model = tiny("llama")
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedHost, match="1 of 21 parameters .* meta device"):
        attach_lora(model)


def test_contexts_in_which_no_trainable_parameter_can_be_made():
    model = tiny("llama")
    before = snapshot(model)
    with torch.inference_mode(), pytest.raises(InvalidOption, match="inference_mode"):
        attach_lora(model)
    with torch.device("meta"), pytest.raises(UnsupportedHost, match="meta device"):
        attach_lora(model)
    assert_same(before, snapshot(model))


def test_adapters_deleted_by_transformers_do_not_hide_what_was_bare():
    model = tiny("llama")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    attach_lora(model)
    model.delete_adapter("default")
    attach_lora(model)
    detach_lora(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_a_model_set_anew_after_transformers_deleted_the_adapter_comes_back_so():
    model = tiny("llama").eval()
    attach_lora(model, name="first")
    model.delete_adapter("first")
    model.train().requires_grad_(True)
    model.model.embed_tokens.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    attach_lora(model, name="second")
    detach_lora(model, "second")
    assert all(m.training for m in model.modules())
    # transformers leaves its layers without adapters around the base
    flags = {n.replace("base_layer.", ""): flag for n, flag in flags.items()}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize("deleted_by", ["transformers", "diffusers"])
def test_what_a_file_said_of_a_deleted_adapter_is_not_said_of_the_next(deleted_by, tmp_path):
    host = tiny("llama") if deleted_by == "transformers" else tiny_pipeline("sd")
    model = host if deleted_by == "transformers" else host.unet
    randomise(attach_lora(model, rank=4, targets="attention"))
    save_lora(host, tmp_path / "old")
    weights = next((tmp_path / "old").glob("*.safetensors"))
    with safe_open(weights, "pt") as file:
        tensors, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
    save_file(tensors, weights, metadata=header | {"ss_tag_frequency": "{}"})
    detach_lora(model)
    load_lora(host, tmp_path / "old")
    assert "ss_tag_frequency" in _header(save_lora(host, tmp_path / "again"))
    if deleted_by == "transformers":
        host.delete_adapter("default")
    else:
        host.unload_lora_weights()
    attach_lora(model, rank=4, targets="attention")
    assert "ss_tag_frequency" not in _header(save_lora(host, tmp_path / "new"))


def test_a_name_given_again_beside_another_adapter_has_no_old_manifest(tmp_path):
    model = randomise(attach_lora(tiny("llama"), rank=4))
    save_lora(model, tmp_path)
    detach_lora(model)
    attach_lora(model, name="other")
    load_lora(model, tmp_path)
    assert record_of(model).manifests
    _deleted_by_transformers(model, "default")
    attach_lora(model)
    assert not record_of(model).manifests


def _deleted_by_transformers(model, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft: which one it makes active instead
        model.delete_adapter(name)


def _header(path):
    weights = path if path.is_file() else next(path.glob("*.safetensors"))
    with safe_open(weights, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("by", ["hf_lora", "transformers"])
@pytest.mark.parametrize(
    ("gone", "active"),
    [
        (["bx", "cx"], "ax"),
        (["cx", "bx"], "ax"),
        (["ax", "cx"], "bx"),
        (["ax", "bx"], "cx"),
        (["bx", "ax"], "cx"),
    ],
)
def test_an_adapter_that_is_left_is_active_again(gone, active, by):
    model, alone = tiny("llama"), {}
    for seed, name in enumerate(("ax", "bx", "cx")):
        alone[name] = logits(randomise(attach_lora(model, name=name, rank=2), seed))
    if by == "transformers":
        _deleted_by_transformers(model, gone[0])
        if gone[0] == "cx":  # peft then chooses the first one
            active = "ax"
    else:
        detach_lora(model, gone[0])
    detach_lora(model, gone[1])
    assert model.active_adapters() == [active]
    assert torch.equal(logits(model), alone[active])
    grads = {n for n, p in model.named_parameters() if p.requires_grad}
    assert grads == {n for n, _ in model.named_parameters() if f".{active}." in n}


def test_two_adapters_that_replaced_each_other_come_back_in_turn():
    model = tiny("llama")
    for seed, name in enumerate(("ax", "bx", "cx", "dx")):
        randomise(attach_lora(model, name=name, rank=2), seed)
    for name in ("bx", "cx", "dx"):
        detach_lora(model, name)
    assert model.active_adapters() == ["ax"]
    set_adapters(model, [])
    attach_lora(model, name="ex")
    detach_lora(model, "ex")
    assert active_names(model) == ()  # as it was before


def test_new_token_rows_beside_another_adapter_do_not_hear_its_name(tmp_path):
    config = peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"])
    model = peft.get_peft_model(tiny("llama"), config).base_model.model
    rows = model.model.embed_tokens.trainable_tokens_delta["default"]
    rows.data += 0.5
    tokens = logits(model)
    save_lora(randomise(attach_lora(tiny("llama"), targets="attention")), tmp_path)
    plain = tiny("llama")
    load_lora(plain, tmp_path)
    load_lora(model, tmp_path, name="lo")
    assert torch.equal(logits(model), logits(plain))
    set_adapters(model, ["default", "lo"])
    plain.model.embed_tokens.weight.data[[1, 2]] = rows
    assert torch.equal(logits(model), logits(plain))
    detach_lora(model, "lo")
    set_adapters(model, "default")
    assert torch.equal(logits(model), tokens)


def test_patterns_and_exclusions_of_a_config_become_literal_and_load_again(tmp_path):
    config = peft.LoraConfig(
        r=8,
        lora_alpha=11,
        exclude_modules=r".*mlp.*",
        rank_pattern={r"layers\.0\..*q_proj": 4},
        alpha_pattern={r".*\.(q|k)_proj": 7},
    )
    model = randomise(attach_lora(tiny("llama"), config=config))
    assert len(tuner_layers(model)) == 8
    save_lora(model, tmp_path)
    fresh = tiny("llama")
    load_lora(fresh, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path))
    assert torch.equal(logits(fresh), logits(model))
    assert torch.equal(logits(theirs.eval()), logits(model))
    layer = tuner_layers(fresh)["model.layers.0.self_attn.q_proj"]
    assert (layer.r["default"], layer.scaling["default"]) == (4, 7 / 4)


def test_an_adapter_of_peft_with_patterns_is_saved_in_literal_names(tmp_path):
    config = peft.LoraConfig(
        r=8, lora_alpha=11, target_modules=r".*(q|v)_proj", rank_pattern={r".*\.0\..*": 4}
    )
    theirs = randomise(peft.get_peft_model(tiny("llama"), config))
    save_lora(theirs, tmp_path)
    fresh = tiny("llama")
    load_lora(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(theirs))


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("VideoMAEForVideoClassification", ["fc_norm", "classifier"]),
        ("ViTForImageClassification", ["classifier"]),
        ("Wav2Vec2ForCTC", ["lm_head"]),
        ("Wav2Vec2ForSequenceClassification", ["projector", "classifier"]),
        ("BertForMultipleChoice", ["classifier"]),
        ("BertForTokenClassification", ["classifier"]),
        ("T5ForQuestionAnswering", ["qa_outputs"]),
        ("BigBirdForQuestionAnswering", ["qa_classifier"]),
    ],
)
def test_fresh_task_heads_are_found(name, heads):
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    assert [h.path for h in plan_lora(model, targets="all-linear").heads] == heads


def test_a_head_that_holds_pefts_own_head_name_is_saved_without_a_task_type():
    kind = transformers.BigBirdForQuestionAnswering
    with torch.device("meta"):
        model = kind(kind.config_class(num_hidden_layers=1))
    config = plan_lora(model).config
    assert config.task_type is None  # peft would wrap qa_outputs inside qa_classifier
    assert config.auto_mapping["base_model_class"] == "BigBirdForQuestionAnswering"


def test_a_host_offloaded_by_accelerate_is_refused():
    model = tiny("llama")
    bare = logits(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(UnsupportedHost, match="offloaded by accelerate"):
        attach_lora(model)
    assert torch.equal(logits(model), bare)


def test_a_config_that_peft_has_written_its_heads_into_is_taken():
    config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(tiny("bert", task="classifier"), config)
    assert set(config.modules_to_save) == {"classifier", "score"}
    plan = plan_lora(tiny("bert", task="classifier"), config=config)
    assert [h.path for h in plan.heads] == ["classifier"]
