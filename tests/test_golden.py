"""The golden snapshot: what every model class gets by default (`make golden` rewrites it).

Three judges. The rows must hold what no row may break; forty classes of all kinds, and those whose
rows are not those of the commit before, are built again and compared; and the hand-written
expectations of `tests/expected_families.py`, read from upstream source before any scan, must agree.
"""

import json
import re
import subprocess
from importlib.metadata import version

import pytest

from hf_lora.roles import NEVER, expand
from tests import scan
from tests.expected_families import BESIDE, EXPECTED
from tests.scan_build import DIFFUSERS, jobs
from tests.scan_configs import EXCEPTIONS, NO_TARGET
from tests.scan_page import page, types_of

ROWS = scan.load()
BUILT = {cls: row for cls, row in ROWS.items() if "cause" not in row}

AGAIN = (
    *("LlamaForCausalLM", "Qwen3MoeForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM"),
    *("MambaForCausalLM", "FalconH1ForCausalLM", "KimiLinearForCausalLM", "RwkvForCausalLM"),
    *("BertForMaskedLM", "ModernBertForMaskedLM", "DebertaV2ForSequenceClassification"),
    *("BartForConditionalGeneration", "T5ForConditionalGeneration", "BartForCausalLM"),
    *("LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
    *("Idefics3ForConditionalGeneration", "Blip2ForConditionalGeneration", "CLIPModel"),
    *("ClapModel", "ViTForImageClassification", "SwinForImageClassification"),
    *("ConvNextForImageClassification", "ResNetForImageClassification"),
    *("SegformerForSemanticSegmentation", "RTDetrForObjectDetection", "Sam2Model"),
    *("WhisperForConditionalGeneration", "Wav2Vec2ForCTC", "WavLMForCTC"),
    *("MusicgenForConditionalGeneration", "UNet2DConditionModel", "UNetMotionModel"),
    *("SD3Transformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel"),
    *("WanTransformer3DModel", "Kandinsky5Transformer3DModel", "HiDreamImageTransformer2DModel"),
    "ZImageTransformer2DModel",
)

# Where the expectations and we differ, reviewed: pattern of the golden file -> why we keep ours.
DIFFER = {
    "SwinForImageClassification": {
        "swin.encoder.layers.*.downsample.reduction": "between stages; the role proj is opt-in, "
        "as the expectations' own note has it",
    },
    "Qwen2VLForConditionalGeneration": {
        "model.visual.merger.mlp.0": "two linears of an MLP in the projector, opt-in either way",
        "model.visual.merger.mlp.2": "two linears of an MLP in the projector, opt-in either way",
    },
}
RENAMED = "peft would turn the name"  # a limit of peft's, which upstream source cannot show


def layers(row):
    """Yields (pattern, role, reason), the reason empty for a default target."""
    for role, found in row["default"].items():
        yield from ((pattern, role, "") for pattern in found)
    for why, roles in row["frozen"].items():
        yield from ((pattern, role, why) for role, found in roles.items() for pattern in found)


def _changed(most=40):
    """Classes whose row differs from that of the last commit, or from the one before where equal.

    None without git, and in a clone that holds one commit. Many at once are a new snapshot, of
    which a share is built.
    """
    path = f"{scan.GOLDEN.parent.name}/{scan.GOLDEN.name}"
    for commit in ("HEAD", "HEAD^"):
        command = ["git", "show", f"{commit}:tests/{path}"]
        found = subprocess.run(command, cwd=scan.GOLDEN.parent, capture_output=True, check=False)
        old = json.loads(found.stdout)["rows"] if found.returncode == 0 else ROWS
        rows = sorted(cls for cls, row in BUILT.items() if old.get(cls) != row)
        if rows:
            return rows[:: len(rows) // most + 1]
    return []


OWN = {name: version(name) for name in ("transformers", "diffusers")}
of_this_version = pytest.mark.skipif(
    scan.versions() != OWN, reason=f"the snapshot is of {scan.versions()}, installed is {OWN}"
)


@of_this_version
@pytest.mark.parametrize("cls", sorted({*AGAIN, *_changed()}))
def test_a_class_that_is_built_again_has_the_row_of_the_snapshot(cls):
    rows = scan.scan({cls: jobs()[cls]})
    assert json.loads(json.dumps(rows[cls])) == ROWS[cls]


def test_forty_classes_are_built_again():
    assert len(set(AGAIN)) == 40


@of_this_version
def test_every_class_of_the_libraries_has_a_row():
    assert set(jobs()) == set(ROWS)


@pytest.mark.parametrize(
    ("auto", "least"),
    [
        *(("CAUSAL_LM", 168), ("MASKED_LM", 50), ("SEQ_TO_SEQ_CAUSAL_LM", 37)),
        *(("IMAGE_TEXT_TO_TEXT", 79), (DIFFUSERS, 61)),
    ],
)
def test_as_many_types_are_built_as_promised(auto, least):
    assert len({t for cls, row in BUILT.items() for t in types_of(cls, row, [auto])}) >= least


def test_every_class_that_is_not_built_says_why():
    assert all(row["cause"] for row in ROWS.values() if "cause" in row)


def test_nothing_is_wrong_in_the_snapshot():
    assert scan.problems(ROWS) == []


def test_no_router_head_embedding_or_other_excluded_role_is_a_default_target():
    wanted = set(expand("default"))
    assert not wanted & set(NEVER)
    taken = {role for row in BUILT.values() for role in row["default"]}
    assert not taken - wanted


def test_no_path_of_a_default_target_names_a_router_a_head_or_an_embedding():
    words = re.compile(
        r"(^|[._])(router|lm_head|heads?|classifier|score|embed_tokens|wte|embeddings?|pooler)$"
    )
    assert not [
        (cls, pattern)
        for cls, row in BUILT.items()
        for pattern, _, why in layers(row)
        if not why and words.search(pattern) and not pattern.endswith(("_head", "q_head"))
    ]


def test_no_layer_of_a_foreign_tower_is_a_default_target_of_a_language_model():
    """Judged by words in the path, with a list of names that only sound like a tower."""
    words = re.compile(
        r"(.*_)?(vision|visual|image|video|audio|speech|codec|vq|vqmodel|qformer|merger|connector"
        r"|projector|tower|resampler|img|acoustic)(_.*)?"
    )
    trunk = {"audio_mlp"}  # higgs_audio_v2: the MLP of audio tokens inside each layer of the trunk
    towers = {
        *("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "TEXT_TO_WAVEFORM"),
        *("CAUSAL_LM", "VISUAL_QUESTION_ANSWERING", "RETRIEVAL", "SEQUENCE_CLASSIFICATION"),
    }
    assert not [
        (cls, pattern)
        for cls, row in BUILT.items()
        if row["auto"].keys() & towers
        for pattern, _, why in layers(row)
        if not why
        if any(words.fullmatch(part) for part in set(pattern.split(".")) - trunk)
    ]


def test_projectors_are_the_trunk_of_one_class_only():
    assert [c for c, row in BUILT.items() if "projector" in row["main"]] == [
        "Blip2ForImageTextRetrieval"
    ]


def test_denoisers_get_attention_only():
    words = {r.split(".")[0] for row in BUILT.values() if DIFFUSERS in row["auto"]
             for r in row["default"]}  # fmt: skip
    assert words == {"attn", "cross_attn"}


def test_exceptions_and_reasons_are_still_needed():
    for cls, patterns in EXCEPTIONS.items():
        assert set(patterns) == set(ROWS[cls]["frozen"]["unknown"]["?"])
    unused = [
        start
        for start in NO_TARGET
        if not any(c.startswith(start) and not row["default"] for c, row in BUILT.items())
    ]
    assert not unused


def test_a_number_that_differs_between_layers_is_a_star():
    paths = ["a.0.ff.0", "a.1.ff.0", "b.expert_3.w", "b.expert_4.w", "c.0.x"]
    assert scan.patterns(paths) == {"a.*.ff.0": 2, "b.expert_*.w": 2, "c.0.x": 1}


def test_a_missing_role_or_target_is_a_problem():
    row = {"default": {}, "frozen": {"unknown": {"?": {"layers.*.odd": 3}}}, "plan_gap": ["x"]}
    assert scan.problems({"NewModel": row}) == [
        "NewModel: no role: layers.*.odd",
        "NewModel: no role, but in the plan: x",
        "NewModel: no default target",
    ]


@of_this_version
def test_the_page_is_generated_from_the_snapshot():
    assert scan.PAGE.read_text() == page(ROWS, scan.VERSIONS)


def rule(pattern):
    return re.compile(re.escape(pattern).replace(r"\*", "[0-9]+"))


def expected(cls, pattern):
    """Returns (role, is default target) of the hand-written table, or None where it is silent."""
    name = pattern.replace("*", "7")
    found = [entry for p, entry in EXPECTED[cls].items() if rule(p).fullmatch(name)]
    return next(((e, True) if isinstance(e, str) else (e[0], False) for e in found), None)


@pytest.mark.parametrize("cls", sorted(EXPECTED))
def test_a_row_agrees_with_the_hand_written_expectation(cls):
    wrong = []
    for pattern, role, why in layers(ROWS[cls]):
        entry = expected(cls, pattern)
        if pattern in DIFFER.get(cls, {}):
            assert entry != (role, not why), f"{pattern} agrees now; take it out of DIFFER"
        elif entry is None:
            wrong += [] if why else [f"{pattern} is not expected as a default target"]
        elif entry[0] != role or (entry[1] == bool(why) and not why.startswith(RENAMED)):
            wrong.append(f"{pattern}: {role} {why or 'default'}, expected {entry}")
    assert not wrong


@pytest.mark.parametrize("cls", sorted(EXPECTED))
def test_every_expected_layer_is_in_the_row(cls):
    names = [pattern.replace("*", "7") for pattern, _, _ in layers(ROWS[cls])]
    heads = tuple(f"{path}." for path in ROWS[cls].get("heads", ()))  # trained whole
    assert not [
        p for p in EXPECTED[cls] if not p.startswith(heads or "\0")
        and not any(rule(p).fullmatch(name) for name in names)
    ]  # fmt: skip


@pytest.mark.parametrize("cls", sorted(BESIDE))
def test_what_is_no_linear_is_no_default_target_and_has_the_expected_role_or_none(cls):
    for pattern, role, why in layers(ROWS[cls]):
        name = pattern.replace("*", "7")
        found = [entry for p, entry in BESIDE[cls].items() if rule(p).fullmatch(name)]
        roles = {entry if isinstance(entry, str) else entry[0] for entry in found}
        assert not found or (why and role in {*roles, "?"}), pattern
