"""The mixin in TRL's SFTTrainer, against TRL's own trainer with a PeftModel."""

import shutil

import pytest
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, set_seed

from hf_lora import attach_lora, open_adapter
from hf_lora.testing import tiny
from hf_lora.training.trainer import LoraTrainerMixin
from tests.runs import assert_equal, factors

# trl 1.16 sets an argument that transformers 5.23 calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")


class LoraSFTTrainer(LoraTrainerMixin, trl.SFTTrainer):
    """What a user writes."""


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *"abcdefgh"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def train(out, tokenizer, **kwargs):
    set_seed(0)
    host = attach_lora(tiny("llama"), dropout=0.1)
    texts = [" ".join("abcdefgh"[(i * j) % 8] for j in range(1, 9)) for i in range(1, 25)]
    run = LoraSFTTrainer(
        model=host,
        args=trl.SFTConfig(
            output_dir=str(out),
            max_steps=6,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            max_length=32,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    run.train(**kwargs)
    return run, factors(host)


def test_sft_trainer_saves_adapters_alone_and_resumes_to_the_bit(tmp_path, tokenizer):
    _, whole = train(tmp_path / "a", tokenizer)
    assert any(value.count_nonzero() for name, value in whole.items() if "lora_B" in name)
    assert open_adapter(tmp_path / "a" / "checkpoint-6").manifest.training["steps"] == 6
    assert not (tmp_path / "a" / "checkpoint-6" / "model.safetensors").exists()
    shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "b" / "checkpoint-4")
    again, resumed = train(tmp_path / "b", tokenizer, resume_from_checkpoint=True)
    assert again._initial_global_step == 4
    assert_equal(whole, resumed)
