"""Configurations: what is shipped resolves, what cannot work is refused in one sentence."""

from pathlib import Path

import pytest

from agro_train import config
from agro_train.cli import main


@pytest.mark.parametrize("name", list(config.shipped()))
def test_shipped_configuration_resolves_by_name_and_as_a_path(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", name, "--dry-run"]) == 0
    by_name = capsys.readouterr().out
    assert main(["train", f"configs/{name}.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == by_name
    assert "beta:" in by_name


def test_llama3_configuration_is_the_papers_on_many_gpus() -> None:
    resolved = config.load(config.find("llama3-8b-math"))
    assert resolved.beta == 0.001
    assert resolved.mixed_precision == "bf16"
    assert resolved.attn_implementation == "flash_attention_2"
    assert resolved.gradient_checkpointing and resolved.fsdp


def test_dry_run_prints_a_file_that_resolves_to_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--dry-run", "beta=0.5", "recorded=[a.jsonl,b.jsonl]"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(printed)
    again = config.load(tmp_path / "run.yaml")
    assert again.beta == 0.5 and again.recorded == ["a.jsonl", "b.jsonl"]
    assert again.to_yaml() == printed


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bta=0.1", "bta: expected one of the known keys, got an unknown one"),
        ("beta=high", "beta: "),
        ("beta=0", "beta: expected a number above 0, got 0"),
        ("beta=nan", "beta: expected a finite number, got nan"),
        ("learning_rate=.inf", "learning_rate: expected a finite number, got inf"),
        ("adam_beta1=1.0", "adam_beta1: expected a number from 0 to below 1, got 1.0"),
        ("prompt_template=Solve", "prompt_template: expected {prompt} in it, got 'Solve'"),
        ("steps=0", "steps: expected at least 1, got 0"),
        ("num_generations=1", "num_generations: expected at least 2, got 1"),
        ("algorithm=ppo", "algorithm: expected one of agro, pg_"),
        ("dtype=float16", "dtype: expected one of float32, bfloat16, got 'float16'"),
        ("recorded_fraction=1.5", "recorded_fraction: expected 0 to 1, got 1.5"),
        ("replay_fraction=-1", "replay_fraction: expected 0 to 1, got -1"),
        ("replay_fraction=0.01", "replay_fraction: expected a share of one group or more"),
        ("replay_max_staleness=0", "replay_max_staleness: expected at least 1, got 0"),
        ("reward=[]", "reward: expected one or more functions, each once, got []"),
        ("reward=[math,math]", "reward: expected one or more functions, each once"),
        ("reward_weights=[1,2]", "reward_weights: expected 1 numbers, one for each function"),
        ("reward_weights=.nan", "reward_weights: expected finite numbers, got [nan]"),
        ("math_timeout_s=0", "math_timeout_s: expected a number above 0, got 0"),
        ("lr_baseline=2", "lr_baseline: expected auto or a number from 0 to 1, got '2'"),
        ("steps", "arguments: expected one configuration"),
    ],
)
def test_bad_setting_is_one_sentence_and_exit_status_2(
    setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "tiny-arithmetic", setting, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"agro: {message}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        (["algorithm=pg_loo", "lr_weight=1"], "lr_weight"),
        (["recorded=[a.jsonl]", "lr_weight=1"], "lr_weight"),
        (["recorded=[a.jsonl]", "recorded_fraction=0.6", "replay_fraction=0.5"], "replay_fraction"),
        (["attn_implementation=flash_attention_2"], "share_prompts"),
    ],
)
def test_combination_that_cannot_work_is_refused(settings: list[str], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}.*expected .* got "):
        config.load(None, settings)


def test_run_saves_before_its_end_by_default() -> None:
    assert 0 < config.TrainConfig().save_every <= 50 < config.TrainConfig().steps


def test_one_reward_may_stand_without_brackets() -> None:
    assert config.load(None, ["reward=math"]).reward == ["math"]
    several = config.load(None, ["reward=[math,my.module:function]", "reward_weights=[1,0.2]"])
    assert several.reward == ["math", "my.module:function"] and several.reward_weights == [1, 0.2]
    assert config.load(None, ["reward_weights=2"]).reward_weights == [2.0]


def test_unknown_configuration_lists_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match="smollm2-math.*got 'nothing'"):
        config.find("nothing")


def test_shipped_name_in_another_folder_is_no_shipped_configuration() -> None:
    with pytest.raises(ValueError, match="got 'typo/tiny-arithmetic.yaml'"):
        config.find("typo/tiny-arithmetic.yaml")


def test_yaml_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- beta\n")
    with pytest.raises(ValueError, match="config: expected keys and values in .*list.yaml"):
        config.load(tmp_path / "list.yaml")


def test_broken_yaml_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("beta: [1\n")
    with pytest.raises(ValueError, match="broken.yaml"):
        config.load(path)
