"""Configurations: what is shipped resolves, what cannot work is refused in one sentence."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_origin

import pytest

from agro_train import config
from agro_train.cli import main
from agro_train.keys import Key, key, keys_of
from agro_train.refusal import Refusal
from agro_train.settings import KEYS, TrainConfig

ROOT = Path(__file__).parents[2]
NUMERIC = [one for one in KEYS.values() if one.kind in (int, float)]
LISTS = [one for one in KEYS.values() if get_origin(one.kind) is list and not one.verbatim]


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
        ("bta=0.1", "bta: expected one of the known keys, got an unknown one; nearest: beta"),
        (
            "lerning_rate=1",
            "lerning_rate: expected one of the known keys, got an unknown one; nearest: "
            "learning_rate; agro",
        ),
        ("data=''", "data: expected prompts for the groups that are not recorded, got none; give"),
        ("zzz=1", "zzz: expected one of the known keys, got an unknown one; agro train --help"),
        ("steps.x=1", "steps: expected an integer, got {'x': 1}"),
        ("steps=3.0", "steps: expected an integer, got 3.0"),
        ("steps=true", "steps: expected an integer, got True"),
        ("beta=true", "beta: expected a number, got True"),
        ("beta=", "beta: expected a number, got nothing"),
        ("beta=[1", "beta: expected a value as YAML has it, got beta=[1: "),
        ("fsdp=maybe", "fsdp: expected true or false, got 'maybe'"),
        ("eval_data=", "eval_data: expected text, got nothing; write \"''\" for empty text"),
        (
            "prompt_template={prompt}",
            "prompt_template: expected text, got {'prompt': None}; q",
        ),
        ("recorded=", "recorded: expected a list of texts, got nothing; write [] for none"),
        ("recorded=[[a]]", "recorded: expected a list of texts, got [['a']]"),
        ("reward={a: 1}", "reward: expected a list of texts, got {'a': 1}"),
        ("reward_weights=[1,x]", "reward_weights: expected a list of numbers, got [1, 'x']"),
        ("lora_target_modules=[]", "lora_target_modules: expected all-linear or names of linear"),
        ("run_name=${nothing}", "config: expected values that can be resolved, got "),
        ("=1", "arguments: expected key=value, got '=1'"),
        (
            "vllm_server_base_url=http://[x",
            "vllm_server_base_url: expected http://HOST:PORT, each server once, got",
        ),
        (
            "vllm_server_base_url=http://x:y",
            "vllm_server_base_url: expected http://HOST:PORT, each server once, got",
        ),
        ("vllm_server_base_url=", "vllm_server_base_url: expected a list of texts, got nothing"),
        (
            "vllm_server_base_url=[]",
            "vllm_server_base_url: expected http://HOST:PORT, each server once, got",
        ),
        ("vllm_gpu_memory_utilization=2", "vllm_gpu_memory_utilization: expected a number above 0"),
        ("algorithm=:function", "algorithm: expected one of agro, pg_loo, "),
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


def beyond(one: Key) -> Iterator[tuple[float, float]]:
    """Values just outside each limit, each with its neighbour inside."""
    for limit, inside, outside in (
        (one.least, 0, -1),
        (one.above, 1, 0),
        (one.most, 0, 1),
        (one.below, -1, 0),
    ):
        if limit is not None and one.kind is int:
            yield int(limit) + outside, int(limit) + inside
        elif limit is not None:
            steps = {0: float(limit)}
            steps |= {way: math.nextafter(limit, way * math.inf) for way in (-1, 1)}
            yield steps[outside], steps[inside]


def test_every_number_but_the_seed_has_a_limit() -> None:
    assert [one.name for one in NUMERIC if not list(beyond(one))] == ["seed"]


@pytest.mark.parametrize("one", NUMERIC, ids=lambda one: one.name)
def test_number_just_beyond_its_limit_is_refused(one: Key) -> None:
    for outside, inside in beyond(one):
        one.check(inside)
        with pytest.raises(Refusal) as error:
            config.load(None, [f"{one.name}={outside!r}"])
        assert str(error.value).startswith(f"{one.name}: expected {one.limits}, got {outside!r}")
    if one.infinite:
        assert getattr(config.load(None, [f"{one.name}=.inf"]), one.name) == math.inf
    elif one.kind is float:
        with pytest.raises(Refusal, match=f"^{one.name}: expected a finite number, got inf$"):
            config.load(None, [f"{one.name}=.inf"])


@pytest.mark.parametrize(
    "one", [one for one in KEYS.values() if one.choices], ids=lambda one: one.name
)
def test_choice_that_is_none_is_refused(one: Key) -> None:
    for choice in one.choices:
        one.check(choice)
    with pytest.raises(Refusal, match=f"^{one.name}: expected one of .*, got 'other'$"):
        config.load(None, [f"{one.name}=other"])


def test_infinity_is_a_value_where_a_key_says_so() -> None:
    @dataclass
    class Settings:
        power: float = key(1.0, "a power", least=0, infinite=True)

    (power,) = keys_of(Settings).values()
    power.check(power.read(".inf".removeprefix(".")))
    for value in (-math.inf, math.nan):
        with pytest.raises(Refusal, match="power: expected a finite number"):
            power.check(value)


def test_help_lists_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    shown = [line.strip() for line in lines]
    groups = [shown.index(f"{one.heading}:") for one in KEYS.values() if one.heading]
    assert groups == sorted(groups)
    for one in KEYS.values():
        assert one.setting in shown and one.meaning
    assert "beta=0.01" in shown and "recorded=[]" in shown and "eval_data=''" in shown


def test_page_of_the_configuration_is_what_the_fields_say() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == config.page(), "python -m agro_train.config > docs/configuration.md"


@pytest.mark.parametrize("one", LISTS, ids=lambda one: one.name)
def test_list_stands_with_and_without_brackets(one: Key) -> None:
    texts = {
        "report_to": ["wandb", "trackio"],
        "reward_weights": ["1", "0.5"],
        "vllm_server_base_url": ["http://a:1", "http://b:2"],
    }
    first, second = texts.get(one.name, ["a.b", "c:d"])
    expected = [float(first), float(second)] if one.name == "reward_weights" else [first, second]
    for spelt in (f"[{first},{second}]", f"{first},{second}", f"{first}, {second}"):
        settings = [f"{one.name}={spelt}"]
        settings += ["reward=[a:b,c:d]"] if one.name == "reward_weights" else []
        assert getattr(config.load(None, settings), one.name) == expected
    assert getattr(config.load(None, [f"{one.name}={first}"]), one.name) == expected[:1]
    assert getattr(config.load(None, [f"{one.name}=[{first}]"]), one.name) == expected[:1]


@pytest.mark.parametrize(
    ("spelt", "texts"),
    [
        ("stop=a,b", ["a,b"]),
        ("stop=[a,b]", ["a", "b"]),
        (r'stop="\n\n"', ["\n\n"]),
        (r'stop=["\n\n", "x, y"]', ["\n\n", "x, y"]),
        ("stop=[]", []),
    ],
)
def test_stop_string_stands_as_it_is(spelt: str, texts: list[str]) -> None:
    assert config.load(None, [spelt]).stop == texts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["top_k=1025"], "top_k: expected 0 to 1024, got 1025; the ids kept are recorded"),
        (["top_p=0"], "top_p: expected a number above 0, at most 1, got 0.0"),
        (["min_p=1"], "min_p: expected a number from 0 to below 1, got 1.0"),
        (["stop=['']"], "stop: expected texts of one character or more, got \\[''\\]"),
        (
            ["min_new_tokens=9", "max_completion_length=8"],
            "min_new_tokens: expected at most max_completion_length=8, got 9",
        ),
        (
            ["top_p=0.9", "demonstrations=solution"],
            "demonstrations: expected no top_k, top_p or min_p, got top_k=0 top_p=0.9 min_p=0.0",
        ),
        (
            ["top_p=0.9", "use_vllm=true"],
            "top_k: expected 1 or more where vLLM samples with top_p or min_p, got top_k=0 top_p=",
        ),
        (["min_p=0.1", "use_vllm=true"], "top_k: expected 1 or more where vLLM samples"),
    ],
)
def test_sampling_that_cannot_be_scored_exactly_is_refused(
    settings: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config.load(None, settings)
    config.load(None, ["top_p=0.9", "min_p=0.1", "top_k=20", "use_vllm=true"])


def test_weights_go_to_a_server_by_a_group_and_to_no_other_engine() -> None:
    config.load(None, ["use_vllm=true", "vllm_mode=server", "vllm_weight_transfer=gloo"])
    with pytest.raises(ValueError, match="vllm_weight_transfer: expected auto or files with"):
        config.load(None, ["use_vllm=true", "vllm_weight_transfer=gloo"])


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ([], 3, "vllm_tensor_parallel_size: expected a divisor of the launch's 3 processes, of"),
        (["max_staleness=1"], 4, "max_staleness: expected 0 where processes share an engine"),
        (["max_staleness=1"], 1, None),  # vLLM starts the other processes itself
        (["max_staleness=1", "vllm_tensor_parallel_size=1"], 3, None),
        (["vllm_mode=server"], 3, None),
        ([], 4, None),
    ],
)
def test_launch_that_engines_cannot_share_is_refused(
    settings: list[str], processes: int, message: str | None
) -> None:
    found = config.load(None, ["use_vllm=true", "vllm_tensor_parallel_size=2", *settings])
    if message is None:
        found.check_processes(processes)
    else:
        with pytest.raises(ValueError, match=message):
            found.check_processes(processes)


def test_commas_within_quotes_stay(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text('recorded: ["a,b.jsonl"]\n')
    assert config.load(tmp_path / "run.yaml").recorded == ["a,b.jsonl"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("beta=1", 1.0),
        ("beta='0.5'", 0.5),
        ("learning_rate=1e-5", 1e-5),
        ("steps='3'", 3),
        ("steps=1_000", 1000),
        ("seed=-3", -3),
        ("fsdp=1", True),
        ("fsdp=yes", True),
        ("fsdp='off'", False),
        ("fsdp='0'", False),
        ("run_name=5", "5"),
        ("run_name=true", "True"),
        ("run_name=2024-01-02", "2024-01-02"),
        ("lr_baseline=0.50", "0.5"),
        ("project=a=b", "a=b"),
        ("recorded=[a.jsonl,3]", ["a.jsonl", "3"]),
        ("output_dir=runs/${seed}", "runs/0"),
        ("lr_weight=${beta}", 0.01),
        ("algorithm=my_module:my_function", "my_module:my_function"),
    ],
)
def test_value_has_its_keys_type(setting: str, value: object) -> None:
    found = getattr(config.load(None, [setting]), setting.partition("=")[0])
    assert found == value and type(found) is type(value)


def test_what_may_change_when_a_run_is_resumed() -> None:
    assert {one.name for one in KEYS.values() if one.resumable} == {
        "beta",
        "steps",
        "num_train_epochs",
        "learning_rate",
        "callbacks",
        "fsdp",
        "eval_every",
        "eval_prompts",
        "eval_generations",
        "save_every",
        "save_total_limit",
        "vllm_server_base_url",
        "vllm_server_timeout",
        "vllm_weights_dir",
        "vllm_weight_transfer",
        "vllm_gpu_memory_utilization",
        "samples_every",
        "report_to",
    }


def test_resumed_run_keeps_its_folder_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("007").mkdir()
    Path("007/config.yaml").write_text(config.TrainConfig().to_yaml())
    assert config.load_resumed(Path("007"), ["steps=5"]).output_dir == "007"
    with pytest.raises(Refusal, match="expected no configuration with --resume, got my.yaml"):
        config.load_resumed(Path("007"), ["my.yaml"])


def test_run_saves_before_its_end_by_default() -> None:
    assert 0 < config.TrainConfig().save_every <= 50 < config.TrainConfig().steps


def test_one_reward_may_stand_without_brackets() -> None:
    assert config.load(None, ["reward=math"]).reward == ["math"]
    several = config.load(None, ["reward=[math,my.module:function]", "reward_weights=[1,0.2]"])
    assert several.reward == ["math", "my.module:function"] and several.reward_weights == [1, 0.2]
    assert config.load(None, ["reward_weights=2"]).reward_weights == [2.0]


def test_only_model_and_data_left_alone_have_the_tiny_models_settings() -> None:
    tiny = config.load(config.find("tiny-arithmetic"))
    plain = TrainConfig()
    assert (tiny.learning_rate, tiny.max_completion_length) == (3e-4, 24)
    assert config.load(None, []) == tiny
    assert config.load(None, ["model=tiny"]) == tiny
    assert config.load(None, ["beta=0.5"]) == replace(tiny, beta=0.5)
    for name, value in (("model", "some/model"), ("data", "arithmetic")):
        found = config.load(None, [f"{name}={value}"])
        assert found == replace(plain, **{name: value})
        assert (found.learning_rate, found.max_completion_length) == (1e-5, 64)


def test_recorded_files_without_data_go_without(tmp_path: Path) -> None:
    assert config.load(None, ["recorded=a.jsonl"]).data == ""
    assert config.load(None, ["model=x", "recorded=a.jsonl"]).data == ""
    assert config.load(None, ["recorded=a.jsonl", "data=arithmetic"]).data == "arithmetic"
    mixed = ["recorded=a.jsonl", "recorded_fraction=0.5"]  # the other half is fresh
    assert config.load(None, mixed).data == "tiny-arithmetic"
    (tmp_path / "a.yaml").write_text("recorded: [a.jsonl]\n")
    assert config.load(tmp_path / "a.yaml").data == ""
    (tmp_path / "a.yaml").write_text("recorded: [a.jsonl]\ndata: arithmetic\n")
    assert config.load(tmp_path / "a.yaml").data == "arithmetic"


def test_of_steps_and_epochs_the_later_word_counts(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 40\nnum_train_epochs: 2\n")
    for load in (config.load_resumed, lambda at, more=(): config.load(at / "config.yaml", more)):
        assert load(tmp_path).num_train_epochs == 2.0
        assert load(tmp_path, ["steps=50"]).num_train_epochs == 0.0
        assert load(tmp_path, ["num_train_epochs=3"]).num_train_epochs == 3.0
        with pytest.raises(Refusal, match="num_train_epochs: expected it or steps, got 3 and step"):
            load(tmp_path, ["num_train_epochs=3", "steps=50"])


def test_mistyped_configuration_names_the_nearest() -> None:
    with pytest.raises(Refusal, match="nearest: smollm2-math.*; there is no such file"):
        config.find("smolm2-math")


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


@pytest.mark.parametrize(
    "content", [b"3\n", b"\xe6\n", b"a: !!python/name:os.system\n", b"a: *b\n"]
)
def test_file_that_is_no_configuration_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(Refusal, match=r"^config: expected a YAML file, got .*run\.yaml: "):
        config.load(tmp_path / "run.yaml")


def test_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("1: 2\n")
    with pytest.raises(Refusal, match="^1: expected one of the known keys"):
        config.load(tmp_path / "run.yaml")


def test_no_is_a_word_where_it_is_a_choice() -> None:
    """YAML reads it as false."""
    assert config.load(None, ["mixed_precision=no"]).mixed_precision == "no"


def test_a_run_from_before_the_taper_goes_on_without_it(tmp_path: Path) -> None:
    today = TrainConfig().to_yaml()
    (tmp_path / "config.yaml").write_text(today)
    assert config.load_resumed(tmp_path).off_policy_taper == 1.0
    lines = [line for line in today.splitlines() if not line.startswith("off_policy")]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert config.load_resumed(tmp_path).off_policy_taper == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["environment=calculator"], "environment: expected module:Class, got 'calculator'"),
        (["environment=a:B", "max_turns=0"], "max_turns: expected at least 1, got 0"),
        (
            ["environment=a:B", "demonstrations=solution"],
            "demonstrations: expected none with environment=a:B, got solution",
        ),
        (["reward=environment"], "reward: expected environment=module:Class with reward=environ"),
    ],
)
def test_environment_that_cannot_work_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load(None, settings)
    config.load(None, ["environment=a:B", "reward=[environment,number]", "max_staleness=2"])
