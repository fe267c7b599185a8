"""The public names and their signatures: a change here is a change for every user."""

import inspect

import pytest

import hf_lora
from hf_lora import errors

NAMES = {
    # attach, run, merge
    "plan_lora",
    "attach_lora",
    "detach_lora",
    "base_model",
    "as_peft_model",
    "set_adapters",
    "merge_lora",
    "unmerge_lora",
    # disk
    "save_lora",
    "load_lora",
    "open_adapter",
    "save_adapter",
    "probe_lora",
    # Hub
    "push_lora",
    "pull_lora",
    "CardExtras",
    # records
    "Adapter",
    "LoraPlan",
    "LoadReport",
    "ProbeReport",
    "LoadLimits",
    # training
    "DiffusionTrainingModule",
    "LoraTrainer",
    "LoraTrainerMixin",
    "LoraCallback",
    "lora_optimizer",
    # families
    "Family",
    "register_family",
}
ATTACH = (
    "(host, *, rank=16, alpha=None, targets='default', dropout=0.0, components=None, "
    "train_also=None, name='default', config=None)"
)
SIGNATURES = {
    "plan_lora": ATTACH,
    "attach_lora": ATTACH,
    "detach_lora": "(host, name=None)",
    "base_model": "(host)",
    "as_peft_model": "(host)",
    "set_adapters": "(host, names, weights=None)",
    "merge_lora": "(host, names=None, *, keep='cpu')",
    "unmerge_lora": "(host)",
    "save_lora": "(host, path, *, name='default')",
    "load_lora": (
        "(host, source, *, name=None, file=None, scale=1.0, revision=None, token=None, "
        "trainable=False, strict=True, extra_modules=False, limits=None)"
    ),
    "open_adapter": "(source, *, host=None, limits=None)",
    "save_adapter": "(adapter, path, *, layout=None, host=None)",
    "probe_lora": "(source, host=None)",
    "push_lora": (
        "(host, repo_id, *, name='default', revision=None, private=None, create_pr=False, "
        "tag=None, message=None, token=None, base_model='', card=None, images=None)"
    ),
    "pull_lora": "(repo_id, *, file=None, revision=None, token=None, host=None, limits=None)",
}


def spelled(function):
    """Returns the signature without its annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def error_names():
    return {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.LoraError)
    }


def test_exactly_these_names_are_exported():
    assert set(hf_lora.__all__) == NAMES | error_names()


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signature(name):
    assert spelled(getattr(hf_lora, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_says_what_it_does(name):
    assert inspect.getdoc(getattr(hf_lora, name))


@pytest.mark.parametrize("name", sorted(error_names()))
def test_every_error_is_drawn_in_the_tree(name):
    assert name in (errors.__doc__ or "")


def test_no_public_function_takes_keyword_soup():
    assert not [name for name in SIGNATURES if "**" in spelled(getattr(hf_lora, name))]
