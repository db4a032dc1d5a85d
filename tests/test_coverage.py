"""A sample of the coverage sweep, over the families of models: planned, applied, trained a step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.coverage import Row, conclude

ROOT = Path(__file__).parents[1]

FAMILIES = {
    "decoders": "bloom falcon gemma2 gpt2 gpt_neox llama olmo2 opt phi3 qwen3",
    "encoders": "albert bert deberta-v2 distilbert electra fnet funnel modernbert roberta xlnet",
    "encoder-decoders": "bart led m2m_100 marian pegasus t5 umt5",
    "experts": "deepseek_v3 gpt_oss mixtral olmoe qwen3_moe",
    "states": "mamba rwkv",
    "pictures": "beit convnext deit dinov2 resnet segformer swin vit",
    "detection": "conditional_detr detr rt_detr yolos",
    "sound": "audio-spectrogram-transformer hubert speech_to_text wav2vec2 whisper",
    "several kinds": "blip clip git layoutlm llava paligemma qwen2_vl siglip vilt",
    "others": "decision_transformer esm patchtst time_series_transformer",
}


def test_the_sample_is_wide() -> None:
    types = [name for names in FAMILIES.values() for name in names.split()]
    assert len(set(types)) == len(types) >= 60


@pytest.mark.parametrize("family", FAMILIES)
def test_every_class_of_the_family_passes(family: str) -> None:
    """Bitwise gradients, the budget kept, and 97 % of the classes: all of so few."""
    types = FAMILIES[family].split()
    done = subprocess.run(
        [sys.executable, "benchmarks/coverage.py", "--jobs", "1", "--types", *types],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"\n{len(types)} passed\n" in done.stdout, done.stdout


def _row(result: str, measured_bytes: int = 100) -> Row:
    return Row("type", "Class", result, predicted_bytes=100, measured_bytes=measured_bytes)


@pytest.mark.parametrize(
    ("results", "code"),
    [
        (["passed"] * 97 + ["no plan"] * 3 + ["not built"] * 50, 0),
        (["passed"] * 96 + ["no plan"] * 4, 1),
        (["passed"] * 99 + ["gradients"], 1),
        (["passed"] * 99 + ["budget"], 1),
        (["not built"], 1),
    ],
)
def test_the_exit_code_says_whether_coverage_holds(results: list[str], code: int) -> None:
    assert conclude([_row(result) for result in results]) == code


def test_near_predictions_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    conclude([_row("passed"), _row("passed", 101), _row("passed", 120)])
    said = capsys.readouterr().out
    assert "100.00 % of the classes" in said and "66.7 % within 1 %" in said
