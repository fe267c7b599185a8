"""`hf-lora train` for pipelines: folders of pictures with captions, and all that can be wrong."""

import dataclasses
import json
import os
import shutil
import zlib

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_lora import BadDataset, InvalidOption, open_adapter
from hf_lora.cli import main
from hf_lora.testing import tiny_pipeline
from hf_lora.training.diffusion import picture_rows
from hf_lora.training.recipe import FIELDS, make_recipe
from hf_lora.training.recipe.pictures import prepare_pictures
from hf_lora.training.recipe.ready import prepare
from tests.train_support import base, chats, write

WEIGHTS = "pytorch_lora_weights.safetensors"
SIDE = 16  # pixels, what the tiny pipeline was made for


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Curves take longer to draw than these runs."""
    monkeypatch.setattr("hf_lora.training.summary.can_draw", lambda: False)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("album"), 8)


@pytest.fixture(scope="module")
def run(sd, album, tmp_path_factory):
    """The folder of a finished run of four steps, with its cache in a folder."""
    folder = tmp_path_factory.mktemp("run")
    assert main(words(sd, album, folder / "out", "--cache", str(folder / "cache"))) == 0
    return folder / "out"


def words(model, data, out, *more):
    few = ["--max-steps", "4", "--batch-size", "2", "--rank", "2", "--save-every", "2"]
    few += ["--held-out", "0.25", "--lr", "1e-2", "--caption-dropout", "0.2"]
    given = ["train", "--model", str(model), "--data", str(data), "--out", str(out)]
    return [*given, *few, *more]


def pixels(seed, height=20, width=24, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def folder_of(folder, count):
    """Fills a folder with pictures and texts beside them."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(pixels(i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"no {i}\n")
    return folder


def said(capsys):
    """The error of a command, which may stand behind a progress bar."""
    before, mark, line = capsys.readouterr().err.partition("hf-lora: ")
    assert mark, before
    return line


def fault_of(folder, **options):
    """What is wrong with a folder, as the error says it."""
    with pytest.raises(BadDataset) as caught:
        picture_rows(str(folder), **({"resolution": SIDE} | options))
    return str(caught.value)


def opened(path, side=SIDE):
    """The one picture of a folder, bytes (side, side, 3)."""
    (path.parent / f"{path.stem}.txt").write_text("x")
    return np.asarray(picture_rows(str(path.parent), resolution=side)[0]["image"])


def of_pictures():
    return [n for n, row in FIELDS.items() if row.metadata["only"] == "pipeline"]


# --- a run --------------------------------------------------------------------------------------


def test_plain_diffusers_loads_what_was_trained_on_a_folder(run, sd):
    there = {path.name for path in run.iterdir()}
    assert {WEIGHTS, "train.yaml", "report.json", "checkpoint-2", "checkpoint-4"} <= there
    pipe = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    pipe.load_lora_weights(str(run))
    held = {n: p for n, p in pipe.unet.named_parameters() if "lora_" in n}
    saved = load_file(run / WEIGHTS)
    assert len(held) == len(saved)
    for name, value in held.items():
        key = "unet." + name.replace(".default_0", "")
        assert torch.equal(value, saved[key]), name
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)
    assert main(["verify", str(run), "--base", sd]) == 0


def test_the_report_and_the_recipe_say_what_was_done(run, sd, album):
    recipe = prepare(make_recipe({"model": sd, "data": [str(album)], "held_out": 0.25})).recipe
    assert (recipe.resolution, recipe.alpha, recipe.lr, recipe.rank) == (SIDE, 16.0, 1e-4, 16)
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 4
    assert len(report["curves"]["eval_loss"]) >= 4  # before, and at each fifth
    facts = open_adapter(run).manifest.training
    assert (facts["task"], facts["resolution"]) == ("pictures", SIDE)


def test_a_resumed_run_reads_its_cache_again_and_gives_the_same_bytes(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoint-4")
    (out / WEIGHTS).unlink()
    monkeypatch.setattr("hf_lora.training.recipe.pictures.cache_rows", None)  # read, not made
    assert main(["train", "--resume", "--out", str(out)]) == 0
    for name, value in load_file(run / WEIGHTS).items():
        assert torch.equal(value, load_file(out / WEIGHTS)[name]), name


def test_a_cache_in_memory_and_none_give_the_same_run(run, sd, album, tmp_path):
    assert main(words(sd, album, tmp_path / "memory")) == 0
    assert main(words(sd, album, tmp_path / "none", "--cache", "none")) == 0
    held, bare = (load_file(tmp_path / name / WEIGHTS) for name in ("memory", "none"))
    for key, value in load_file(run / WEIGHTS).items():
        assert torch.equal(held[key], value)
        # the VAE reads two pictures at a time, not eight; Adam carries the rounding
        torch.testing.assert_close(bare[key], value, rtol=1e-2, atol=1e-3)


def test_text_encoder_trigger_word_and_dora_are_in_the_file(sd, album, tmp_path):
    more = ["--components", "unet,text_encoder", "--trigger", "zwx", "--min-snr-gamma", "5"]
    more += ["--variant", "dora", "--gradient-checkpointing", "--noise-offset", "0.1"]
    assert main(words(sd, album, tmp_path / "out", *more)) == 0
    adapter = open_adapter(tmp_path / "out")
    assert set(adapter.components) == {"unet", "text_encoder"}
    assert adapter.manifest.trigger_words == ("zwx",)
    recipe = make_recipe({"model": sd, "data": [str(album)], "trigger": "zwx"})
    assert prepare(recipe).rows[0]["caption"] == "zwx, no 0"


def test_the_dry_run_reads_no_weights_and_writes_nothing(sd, album, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(sd, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    out = tmp_path / "out"
    assert main(words(bare, album, out, "--dry-run", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["train_sequences"], told["held_out_sequences"], told["steps"]) == (6, 2, 4)
    pipe = tiny_pipeline("sd")
    models = (pipe.unet, pipe.text_encoder, pipe.vae)
    assert told["memory"]["weights"] == 4 * sum(p.numel() for m in models for p in m.parameters())
    assert told["memory"]["step"] > 0, told["memory"]["why_not"]
    assert any("few" in note for note in told["notes"])
    assert not out.exists()


@pytest.mark.parametrize("kind", ["sdxl", "flux", "sd3"])
def test_other_pipelines_are_weighed_too(kind, album, tmp_path):
    tiny_pipeline(kind).save_pretrained(tmp_path / kind)
    given = {"model": str(tmp_path / kind), "data": [str(album)], "resolution": 32}
    _, memory = prepare(make_recipe(given)).weigh()
    assert memory.step, memory.why_not


def test_a_flow_matching_pipeline_trains(album, tmp_path):
    tiny_pipeline("flux").save_pretrained(tmp_path / "flux")
    more = ["--sampling", "logit_normal", "--resolution", "16"]
    assert main(words(tmp_path / "flux", album, tmp_path / "out", *more)) == 0
    assert set(open_adapter(tmp_path / "out").components) == {"transformer"}


def test_samples_are_drawn_in_the_size_of_the_pictures(sd, album, tmp_path, capsys):
    out = tmp_path / "out"
    argv = words(sd, album, out, "--max-steps", "1", "--samples")
    assert main([*argv, "abcdefghijklmnopqrstuvwxyz"]) == 1
    assert "--samples 'abcdefghijklmnopqrstuvwxyz': a caption has 28 tokens" in said(capsys)
    assert main([*argv, "no 1", "yes, 2"]) == 0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {"no 1", "yes, 2"}
    with Image.open(out / rows[0]["file"]) as drawn:
        assert drawn.size == (SIDE, SIDE)


# --- options ------------------------------------------------------------------------------------


def test_options_of_the_other_kind_of_base_are_refused(sd, album, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(sd, album, out, "--packing")) == 1
    assert "--packing is for a language model" in said(capsys)
    rows = write(tmp_path / "chat.jsonl", chats(4))
    llama = base(tmp_path / "llama")
    argv = ["train", "--model", llama, "--data", rows, "--out", str(out), "--resolution", "64"]
    assert main(argv) == 1
    assert "--resolution is for a pipeline" in said(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value", "fact"),
    [
        ("resolution", 17, "no multiple of 2, as VAE"),
        ("prediction", "flow", "prediction='flow'"),
        ("sampling", "mode", "sampling"),
        ("components", ["vae"], "vae"),
    ],
)
def test_options_that_cannot_work_are_named_before_pictures_are_read(option, value, fact, sd):
    given = make_recipe({"model": sd, "data": ["nowhere"], option: value})
    with pytest.raises(InvalidOption, match=fact):
        prepare_pictures(given)


def test_every_option_of_pipelines_is_a_flag_with_its_reason(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert of_pictures()
    assert all(f"--{name.replace('_', '-')}" in text for name in of_pictures())
    assert all(FIELDS[name].metadata["default"] for name in of_pictures())


# --- which file has which caption ---------------------------------------------------------------


def test_four_ways_to_give_captions_give_the_same_rows(tmp_path):
    texts = folder_of(tmp_path / "texts", 3)
    (texts / "2.txt").rename(texts / "2.caption")
    rows = [{"file_name": f"{i}.png", "text": f"no {i}"} for i in range(3)]
    for name in ("jsonl", "csv", "list"):
        shutil.copytree(texts, tmp_path / name, ignore=shutil.ignore_patterns("*.txt", "*.cap*"))
    write(tmp_path / "jsonl" / "metadata.jsonl", rows)
    lines = ["file_name,text", *(f"{i}.png,no {i}" for i in range(3))]
    (tmp_path / "csv" / "metadata.csv").write_text("\n".join(lines))
    listed = [{"image": f"list/{i}.png", "caption": f"no {i}"} for i in range(3)]
    write(tmp_path / "rows.jsonl", listed)
    sources = [texts, tmp_path / "jsonl", tmp_path / "csv", tmp_path / "rows.jsonl"]
    digests = [picture_rows(str(path), resolution=SIDE).digests for path in sources]
    assert len(digests[0]) == 3
    assert all(found == digests[0] for found in digests)


def test_all_faults_of_a_folder_are_said_at_once(tmp_path):
    folder = folder_of(tmp_path / "album", 8)
    for i in range(7):
        (folder / f"{i}.txt").unlink()
    text = fault_of(folder)
    assert "7 faults: 0.png: it has no caption; 1.png" in text
    assert "and 2 more" in text
    assert "metadata.jsonl" in text  # the fix


def _no_caption(folder):
    (folder / "0.txt").unlink()


def _empty_caption(folder):
    (folder / "0.txt").write_text(" \n")


def _not_utf8(folder):
    (folder / "0.txt").write_bytes(b"caf\xe9")


def _long_caption_file(folder):
    (folder / "0.txt").write_text("x" * 70000)


def _same_stem(folder):
    Image.fromarray(pixels(0)).save(folder / "0.jpg")


def _two_captions(folder):
    (folder / "0.caption").write_text("other")


def _cut_off(folder):
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2])


def _no_picture(folder):
    (folder / "0.png").write_text("<html>not found</html>")


def _one_pixel(folder):
    Image.new("RGB", (1, 1)).save(folder / "0.png")


def _animated(folder):
    frames = [Image.fromarray(pixels(i)) for i in range(3)]
    frames[0].save(folder / "0.gif", save_all=True, append_images=frames[1:])
    (folder / "0.png").unlink()


def _link_out(folder):
    target = folder.parent / "secret.png"
    (folder / "0.png").rename(target)
    (folder / "0.png").symlink_to(target)


def _loop(folder):
    (folder / "0.png").unlink()
    (folder / "0.png").symlink_to(folder / "0.png")


def _link_to_nowhere(folder):
    (folder / "0.png").unlink()
    (folder / "0.png").symlink_to(folder / "gone.png")


def _pipe(folder):
    (folder / "0.png").unlink()
    os.mkfifo(folder / "0.png")


def _enormous(folder):
    # a PNG of a few bytes that claims 20,000 x 20,000 pixels
    raw = bytearray((folder / "0.png").read_bytes())
    raw[16:24] = (20000).to_bytes(4, "big") * 2

    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    (folder / "0.png").write_bytes(raw)


def _floats(folder):
    Image.fromarray(np.ones((20, 20), np.float32)).save(folder / "0.tif")
    (folder / "0.png").unlink()


def _program(folder):
    # Pillow would give it to Ghostscript
    (folder / "0.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n")


FAULTS = {
    _no_caption: "0.png: it has no caption",
    _empty_caption: "0.png: its caption is empty",
    _not_utf8: "0.txt: byte 4 of the caption is not UTF-8",
    _long_caption_file: "0.txt: the caption is longer than 65,536 bytes",
    _same_stem: "has the same name, and one caption",
    _two_captions: "0.png: it has two captions, 0.caption, 0.txt",
    _cut_off: "0.png: the picture cannot be read",
    _no_picture: "0.png: the picture cannot be read",
    _one_pixel: "0.png: the picture is 1 x 1 pixels, less than a quarter of 16",
    _animated: "0.gif: the picture has 3 frames",
    _link_out: "0.png is a link that leads out of its folder",
    _loop: "'0.png' is no file or a link that leads nowhere",
    _link_to_nowhere: "0.png: it is no plain file",
    _pipe: "0.png: it is no plain file",
    _enormous: "0.png: the picture has more than",
    _floats: "0.tif: its values are of mode 'F'",
    _program: "0.png: the picture cannot be read",
}


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_named(damage, tmp_path):
    folder = folder_of(tmp_path / "album", 2)
    picture_rows(str(folder), resolution=SIDE)  # sound so far
    damage(folder)
    assert FAULTS[damage] in fault_of(folder)


@pytest.mark.parametrize(
    ("rows", "fact"),
    [
        ([{"file_name": "0.png"}], "it has no text or caption, but 'file_name'"),
        ([{"text": "a"}], "it has no file_name or image"),
        ([{"file_name": "9.png", "text": "a"}], "there is no picture '9.png'"),
        ([{"file_name": "../0.png", "text": "a"}], "leads out of its folder"),
        ([{"file_name": "/etc/hosts", "text": "a"}], "leads out of its folder"),
        ([{"file_name": "0.png", "text": 3}], "it has no text or caption"),
    ],
)
def test_metadata_that_does_not_fit_is_named(rows, fact, tmp_path):
    folder = folder_of(tmp_path / "album", 1)
    write(folder / "metadata.jsonl", rows)
    assert fact in fault_of(folder)


def test_pictures_that_metadata_leaves_out_are_a_fault(tmp_path):
    folder = folder_of(tmp_path / "album", 2)
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n")
    assert "1.png: it has no caption: metadata.csv does not name it" in fault_of(folder)


@pytest.mark.parametrize("held", [[], ["notes.md"]])
def test_a_folder_without_pictures_is_named(held, tmp_path):
    for name in held:
        (tmp_path / name).write_text("x")
    assert f"it holds {held[0] if held else 'nothing'}" in fault_of(tmp_path)


def test_files_that_are_not_read_are_said(tmp_path):
    folder = folder_of(tmp_path / "album", 1)
    (folder / "README.txt").write_text("x")
    (folder / "film.mp4").write_text("x")
    (folder / ".DS_Store").write_text("x")
    notes = picture_rows(str(folder), resolution=24).notes
    assert notes[:2] == [
        "1 other files are not read: film.mp4",
        "1 texts have no picture: README.txt",
    ]
    assert notes[2] == "1 pictures are smaller than 24 pixels, and enlarged"


def test_a_folder_of_the_hub_cache_links_to_blobs(tmp_path):
    folder = tmp_path / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    folder_of(tmp_path / "blobs", 2)
    for path in (tmp_path / "blobs").iterdir():
        (folder / path.name).symlink_to(path)
    assert len(picture_rows(str(folder), resolution=SIDE)) == 2


def test_a_trigger_word_stands_for_an_empty_caption(tmp_path):
    folder = folder_of(tmp_path / "album", 1)
    _empty_caption(folder)
    assert picture_rows(str(folder), resolution=SIDE, trigger="zwx")[0]["caption"] == "zwx"


def test_captions_that_are_too_long_are_named_with_file_and_tokens(sd, tmp_path, capsys):
    folder = folder_of(tmp_path / "album", 3)
    (folder / "1.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    assert main(words(sd, folder, tmp_path / "out")) == 1
    text = said(capsys)
    assert "1.png: a caption has 28 tokens and text_encoder takes 16" in text
    assert not (tmp_path / "out").exists()


# --- what a picture becomes ---------------------------------------------------------------------


def test_a_picture_of_the_right_size_is_taken_as_it_is(tmp_path):
    values = pixels(0, SIDE, SIDE)
    Image.fromarray(values).save(tmp_path / "0.png")
    assert np.array_equal(opened(tmp_path / "0.png"), values)


def test_the_middle_of_a_long_picture_is_taken(tmp_path):
    values = pixels(0, SIDE, 3 * SIDE)
    Image.fromarray(values).save(tmp_path / "0.png")
    assert np.array_equal(opened(tmp_path / "0.png"), values[:, SIDE : 2 * SIDE])


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    values = pixels(0, SIDE, SIDE)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(values).save(tmp_path / "0.png", exif=exif)
    assert np.array_equal(opened(tmp_path / "0.png"), np.rot90(values, -1))


def test_what_is_transparent_becomes_white(tmp_path):
    values = pixels(0, SIDE, SIDE, 4)
    values[..., 3] = 255
    values[:4, :, 3] = 0
    Image.fromarray(values).save(tmp_path / "0.png")
    found = opened(tmp_path / "0.png")
    assert (found[:4] == 255).all()
    assert np.array_equal(found[4:], values[4:, :, :3])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16"])
def test_pictures_of_other_modes_become_rgb(mode, tmp_path):
    grey = np.tile(np.repeat(np.array([0, 255], np.uint8), SIDE // 2), (SIDE, 1))
    path = tmp_path / ("0.jpg" if mode == "CMYK" else "0.png")
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert(mode)
    assert image.mode == mode
    image.save(path)
    found = opened(path).astype(int)
    # JPEG rounds; the other formats keep black and white as they are
    assert np.abs(found - grey[..., None]).max() <= (4 if mode == "CMYK" else 0)


# --- what goes wrong later ----------------------------------------------------------------------


def test_a_run_is_not_resumed_on_another_pipeline(run, sd, tmp_path, capsys):
    moved = tmp_path / "sd"
    shutil.copytree(sd, moved)
    out = tmp_path / "out"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoint-4")
    (out / WEIGHTS).unlink()
    assert main(["train", "--resume", "--out", str(out), "--model", str(moved)]) == 1
    assert "was another one: --model" in said(capsys)
    text = (out / "train.yaml").read_text().replace(json.dumps(sd), json.dumps(str(moved)))
    (out / "train.yaml").write_text(text)
    shutil.rmtree(moved)
    tiny_pipeline("sd", seed=1).save_pretrained(moved)  # another base in the same place
    before = load_file(out / "checkpoint-2" / WEIGHTS)
    assert main(["train", "--resume", "--out", str(out)]) == 1
    line = said(capsys)
    assert "BadCheckpoint" in line
    assert "it was saved on another base" in line
    after = load_file(out / "checkpoint-2" / WEIGHTS)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not (out / WEIGHTS).exists()


def test_other_pictures_are_another_run(run, sd, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(run, out)
    (out / WEIGHTS).unlink()
    other = folder_of(tmp_path / "other", 8)
    (other / "3.txt").write_text("changed")
    text = (out / "train.yaml").read_text().split("\n")
    text = [f"data: {json.dumps([str(other)])}" if x.startswith("data:") else x for x in text]
    (out / "train.yaml").write_text("\n".join(text))
    assert main(["train", "--resume", "--out", str(out)]) == 1
    assert "the data gives other pictures or captions" in said(capsys)


def test_a_vae_that_is_broken_is_named_with_the_picture(sd, album, tmp_path, capsys):
    pipe = tiny_pipeline("sd")
    pipe.vae.encoder.conv_in.weight.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "sd")
    assert main(words(tmp_path / "sd", album, tmp_path / "out")) == 1
    line = said(capsys)
    assert "BadDataset" in line
    assert "0.png: what VAE and text encoders make of it is not finite" in line
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_sound_checkpoints(
    sd, album, tmp_path, capsys, monkeypatch
):
    from hf_lora.training.diffusion import module

    real, calls = module.loss_of, []

    def poisoned(made, noised):
        calls.append(1)
        return real(made, noised) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(module, "loss_of", poisoned)
    out = tmp_path / "out"
    assert main(words(sd, album, out, "--save-every", "1", "--held-out", "0")) == 1
    line = said(capsys)
    assert "TrainingError: the gradients at step 4 are not finite" in line
    assert not (out / WEIGHTS).exists()
    saved = load_file(out / "checkpoint-3" / WEIGHTS)
    assert all(value.isfinite().all() for value in saved.values())
    monkeypatch.setattr(module, "loss_of", real)
    assert main(["train", "--resume", "--out", str(out)]) == 0


def _lacks_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")


def _without(path, name):
    held = load_file(path)
    kept = {key: value for key, value in held.items() if not key.endswith(name)}
    assert len(kept) < len(held)
    save_file(kept, path, {"format": "pt"})


def _lacks_weights_of_text(folder):
    _without(folder / "text_encoder" / "model.safetensors", "q_proj.weight")


def _lacks_weights_of_unet(folder):
    _without(folder / "unet" / "diffusion_pytorch_model.safetensors", "attn2.to_q.weight")


def _cut_off_unet(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _unknown_class(folder):
    (folder / "model_index.json").write_text('{"_class_name": ["pipeline", "Mine"]}')


BROKEN = {
    _lacks_tokenizer: "there is no tokenizer",
    _lacks_weights_of_text: "text_encoder has no weights for",
    _lacks_weights_of_unet: "unet has no weights for",
    _cut_off_unet: "does not load",
    _unknown_class: "does not load",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_pipeline_that_is_not_whole_is_named(damage, sd, album, tmp_path, capsys):
    broken = tmp_path / "sd"
    shutil.copytree(sd, broken)
    damage(broken)
    assert main(words(broken, album, tmp_path / "out")) == 1
    line = said(capsys)
    assert "UnsupportedHost" in line
    assert BROKEN[damage] in line
    assert not (tmp_path / "out").exists()


def test_a_name_that_leads_nowhere_is_no_fault_of_the_options(album, tmp_path, capsys):
    assert main(words("user/nothing", album, tmp_path / "out", "--trigger", "zwx")) == 1
    assert "no usable model config at 'user/nothing'" in said(capsys)


def test_rows_that_mark_a_kind_of_base_default_to_nothing():
    # a value that differs from the default is how one that was given is known
    assert all(FIELDS[name].default is None for name in of_pictures())
    assert dataclasses.is_dataclass(make_recipe({}))
