"""What plain transformers, peft and diffusers push and pull, for the tests of the local Hub."""

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from hf_lora.testing import component_output, tiny, tiny_batch, tiny_pipeline

BASE, ADAPTER = "ann/base", "ann/adapter"
BATCH = {"input_ids": tiny_batch(None)["input_ids"]}


@torch.no_grad()
def logits(model):
    return model.eval()(**BATCH).logits


def push_base():
    """Pushes a tiny model with transformers and returns it as it was."""
    model = tiny("llama")
    model.push_to_hub(BASE)
    return model


def push_adapter():
    """Pushes an adapter with peft, after its base, and returns the model it was made on."""
    push_base()
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        init_lora_weights=False,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
    model.push_to_hub(ADAPTER)
    return model


def pipeline_with_style():
    """Returns a tiny pipeline whose UNet carries an adapter that changes its output."""
    pipe = tiny_pipeline("sd")
    plain = component_output(pipe.unet)
    config = LoraConfig(target_modules=["to_q", "to_v"], r=4, lora_alpha=4, init_lora_weights=False)
    pipe.unet.add_adapter(config)
    assert not torch.equal(component_output(pipe.unet), plain)
    return pipe


def write_style(pipe, folder):
    """Writes the adapter of a pipeline as diffusers does."""
    layers = get_peft_model_state_dict(pipe.unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
