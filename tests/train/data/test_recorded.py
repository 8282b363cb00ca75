"""Recorded rollouts: read right, or refused with file and line."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet

from agro_train.data import kept_ids
from agro_train.data.chat import turn_end
from agro_train.data.recorded import Recorded, load_recorded
from agro_train.data.rollout_log import read_rollouts, rollout_to_json, write_rollouts
from agro_train.policy import tiny
from agro_train.refusal import Refusal
from tests.train.models import SPECIAL, llama3_tokenizer, ragged_rollouts, rollout

TOKENIZER = tiny.build_tokenizer()


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return str(path)


def load(paths: list[str], context: int | None = None, **options: Any) -> Recorded:
    return load_recorded(paths, TOKENIZER, "{prompt}", vocab_size=15, context=context, **options)


def test_rollout_log_is_a_dataset(tmp_path: Path) -> None:
    rollouts = ragged_rollouts()
    path = write(tmp_path / "r.jsonl", *(rollout_to_json(r) + "\n" for r in rollouts))
    groups = load([path]).groups
    assert [len(group) for group in groups] == [3, 2, 4]
    flat = [r for group in groups for r in group]
    assert [(r.prompt_ids, r.completion_ids, r.reward, r.group) for r in flat] == [
        (r.prompt_ids, r.completion_ids, r.reward, r.group) for r in rollouts
    ]


def test_recorded_text_is_tokenised_apart_and_ended_only_where_it_stopped(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+2=", "completion": "3", "reward": 1},
        {"prompt": "1+2=", "completion": "44", "reward": None, "finish": "length"},
        GOOD,
    ]
    ((stopped, cut, _),) = load([write(tmp_path / "r.jsonl", *rows)]).groups
    assert stopped.prompt_ids == tuple(TOKENIZER("1+2=")["input_ids"])
    assert stopped.completion_ids == (*TOKENIZER("3")["input_ids"], TOKENIZER.eos_token_id)
    assert cut.completion_ids == tuple(TOKENIZER("44")["input_ids"])
    assert stopped.reward == 1.0 and cut.reward is None


def test_recorded_reward_that_is_not_finite_counts_as_none(tmp_path: Path) -> None:
    lines = ['{"prompt": "1", "completion": "2", "reward": NaN}\n', *[json.dumps(GOOD1) + "\n"] * 2]
    ((nan, good, _),) = load([write(tmp_path / "r.jsonl", *lines)]).groups
    assert nan.reward is None and good.reward == 1.0


GOOD1 = {"prompt": "1", "completion": "2", "reward": 1.0}
GOOD = {"prompt": "1+2=", "completion": "3", "reward": 1.0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one rollout"),
        ([GOOD], "at least 2 completions a prompt, got 1 for group"),
        ([GOOD, {"prompt": "1+2=", "completion": "3"}], "a column reward in .*line 2"),
        ([GOOD, {"completion": "3", "reward": 1}], "a column prompt_ids or prompt"),
        ([GOOD, {"prompt": "1+2=", "reward": 1}], "a column completion_ids or completion"),
        (
            [GOOD, {**GOOD, "reward": "high"}],
            "or null as reward in .*line 2, got 'high'",
        ),
        ([GOOD, {**GOOD, "completion_ids": [4, 99]}], "ids in \\[0, 15\\).*another tokenizer"),
        ([GOOD, {**GOOD, "finish": "eos"}], "stop or length as finish in .*line 2, got 'eos'"),
        ([GOOD, {**GOOD, "completion": 5}], "str as completion in .*line 2, got 5"),
        ([GOOD, {**GOOD, "group": "1+2=", "prompt": "3"}], "one prompt in group '1\\+2='.*line 2"),
        ([GOOD, {**GOOD, "completion_ids": []}], "one or more ids in"),
    ],
)
def test_bad_recorded_rollout_is_refused_with_its_place(
    rows: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"recorded: expected .*{message}"):
        load([write(tmp_path / "r.jsonl", *rows)])


def test_groups_of_one_are_left_out_and_counted(tmp_path: Path) -> None:
    alone = [{**GOOD, "prompt": f"{i}="} for i in range(3)]
    found = load([write(tmp_path / "r.jsonl", *alone, GOOD, GOOD)])
    assert [[r.prompt for r in group] for group in found.groups] == [["1+2=", "1+2="]]
    assert found.left_out == {"alone": 3, "too_long": 0}
    assert [r.prompt for r in found.files[0].rollouts] == ["1+2=", "1+2="]
    with pytest.raises(Refusal, match="got 1 for group '0=', and no group to learn from among 3"):
        load([write(tmp_path / "alone.jsonl", *alone)])


def test_parquet_is_read_like_jsonl(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+2=", "completion": "3", "reward": 1.0, "group": "a", "finish": None},
        {"prompt": "1+2=", "completion": "4", "reward": None, "group": "a", "finish": "length"},
        {"prompt": "1+2=", "completion_ids": [5, 1], "reward": 0.5, "group": "b"},
        {"prompt": "1+2=", "completion_ids": [6, 1], "reward": 0.0, "group": "b", "answer": "3"},
    ]
    parquet.write_table(Table.from_pylist(_every_column(rows)), tmp_path / "r.parquet")
    from_parquet = load([str(tmp_path / "r.parquet")])
    given = [{k: v for k, v in row.items() if v is not None or k == "reward"} for row in rows]
    assert from_parquet.groups == load([write(tmp_path / "r.jsonl", *given)]).groups
    assert [len(group) for group in from_parquet.groups] == [2, 2]
    assert from_parquet.num_unrewarded == 1
    assert from_parquet.groups[1][1].columns == {"answer": "3"}


def _every_column(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {name for row in rows for name in row}
    return [{name: row.get(name) for name in names} for row in rows]


IDS = {"prompt": "1+2=", "completion_ids": [5, 1], "reward": 1.0}


def test_kept_ids_are_read_as_text_or_lists_where_the_run_scores_over_them(tmp_path: Path) -> None:
    text = kept_ids.encode([[5, 7], [1]])
    rows = [{**IDS, "kept_ids": text}, {**IDS, "kept_ids": [[7, 5], [1]]}]
    path = write(tmp_path / "r.jsonl", *rows)
    (group,) = load([path], truncated=True).groups
    assert [r.kept_ids for r in group] == [text, text]
    parquet.write_table(Table.from_pylist(rows[1:] * 2), tmp_path / "r.parquet")
    (group,) = load([str(tmp_path / "r.parquet")], truncated=True).groups
    assert [r.kept_ids for r in group] == [text, text]
    (group,) = load([path]).groups  # a run that samples from all ids scores over all
    assert [r.kept_ids for r in group] == [None, None] and not group[0].columns


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            None,
            "expected kept_ids in .*, line 1, got none; with top_k, top_p or min_p a",
        ),
        (
            "nonsense",
            "expected kept_ids as a rollout log has them, or a list of ids for each",
        ),
        ([5, 1], "expected kept_ids as a rollout log has them"),
        ([[5], []], "expected kept_ids as a rollout log has them"),
        ([[5]], "got 1 sets for 2 tokens"),
        ([[5, 15], [1]], r"got an id outside \[0, 15\)"),
        ([[5, 2], [2, 3]], "got a set without its token 1, whose probability is then 0"),
    ],
)
def test_kept_ids_that_cannot_be_scored_over_are_refused(
    given: object, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "r.jsonl", *[{**IDS, "kept_ids": given}] * 2)
    with pytest.raises(Refusal, match=message):
        load([path], truncated=True)


def test_ragged_group_may_span_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", GOOD, GOOD, GOOD)
    second = write(tmp_path / "b.jsonl", GOOD, {**GOOD, "prompt": "3="}, {**GOOD, "prompt": "3="})
    recorded = load([first, second])
    assert [len(group) for group in recorded.groups] == [4, 2]
    assert [len(file.rollouts) for file in recorded.files] == [3, 3]
    assert recorded.files[0].sha256 != recorded.files[1].sha256


def test_reference_logprob_is_read_and_not_logged(tmp_path: Path) -> None:
    rows = [{**GOOD, "ref_logprob": -2.5}, {**GOOD, "ref_logprob": None}]
    ((first, second),) = load([write(tmp_path / "r.jsonl", *rows)]).groups
    assert first.ref_logprob == -2.5 and second.ref_logprob is None
    assert "ref_logprob" not in rollout_to_json(first)


def test_samplers_logprob_is_logged_and_read(tmp_path: Path) -> None:
    """What the engine told token by token is logged as its sum, and rounding above 0 as 0."""
    told = replace(ragged_rollouts()[0], sampling_logprobs=(-0.5, -0.25))
    known = replace(told, sampling_logprob=-1.5)
    certain = replace(told, sampling_logprobs=(1e-7,))
    unknown = replace(told, sampling_logprobs=None)
    broken = replace(told, sampling_logprobs=(float("nan"), -1.0))
    lines = [rollout_to_json(r) for r in (told, known, certain, unknown, broken)]
    found = [-0.75, -1.5, 0.0, None, None]
    assert [json.loads(line)["sampling_logprob"] for line in lines] == found
    assert all("sampling_logprobs" not in json.loads(line) for line in lines)
    recorded = load([write(tmp_path / "r.jsonl", *(line + "\n" for line in lines))])
    assert [r.sampling_logprob for r in recorded.groups[0]] == found
    assert recorded.num_without_sampler == 2
    assert [r.sampling_logprob for r in read_rollouts(tmp_path / "r.jsonl")] == found


def test_log_from_before_it_was_logged_still_loads(tmp_path: Path) -> None:
    rows = [json.loads(rollout_to_json(r)) for r in ragged_rollouts()]
    for row in rows:
        del row["sampling_logprob"]
    path = write(tmp_path / "r.jsonl", *rows)
    assert read_rollouts(Path(path)) == ragged_rollouts()
    assert load([path]).num_without_sampler == 9


@pytest.mark.parametrize("value", ["-2", 0.5, True, [], float("nan"), float("-inf")])
def test_samplers_logprob_that_is_none_is_refused(value: object, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", GOOD, {**GOOD, "sampling_logprob": value})
    with pytest.raises(Refusal, match="recorded: expected .* as sampling_logprob in .*line 2, got"):
        load([path])


def test_completion_beyond_the_context_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", GOOD, {**GOOD, "completion": "3" * 10})
    with pytest.raises(
        ValueError, match="at most 12 tokens, the model's context, got 15 in group '1\\+2='"
    ):
        load([path], context=12)
    assert len(load([path], context=15).groups) == 1


def test_group_with_a_completion_beyond_the_context_is_left_out_and_counted(tmp_path: Path) -> None:
    long = {**GOOD, "prompt": "3+4="}
    rows = [GOOD, long, {**long, "completion": "3" * 10}, GOOD]
    found = load([write(tmp_path / "r.jsonl", *rows)], context=12)
    assert [len(group) for group in found.groups] == [2] and found.groups[0][0].prompt == "1+2="
    assert found.left_out == {"alone": 0, "too_long": 1}


def test_recorded_rewards_that_are_all_missing_are_refused(tmp_path: Path) -> None:
    rows = [{**GOOD, "reward": None}, {**GOOD, "reward": float("nan")}, GOOD]
    with pytest.raises(ValueError, match="recorded: expected rewards, .*r.jsonl; agro score FILE"):
        load([write(tmp_path / "r.jsonl", *rows)])


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    right = {**GOOD, "completion": "33", "completion_ids": [5, 5, 1]}
    cut_at_a_stop_string = {**right, "completion_ids": [5, 5, 4]}
    load([write(tmp_path / "a.jsonl", right, right, cut_at_a_stop_string)])
    with_padding_inside = {**right, "completion_ids": [5, 0, 5, 1]}
    load([write(tmp_path / "c.jsonl", with_padding_inside, with_padding_inside)])
    wrong = {**right, "completion_ids": [7, 8, 1]}
    with pytest.raises(ValueError, match="that spell '33' in .*line 2, got '56'; .*tokenizer"):
        load([write(tmp_path / "b.jsonl", right, wrong, wrong)])


CHAT = llama3_tokenizer()
TURN_END = turn_end(CHAT)


def ids(text: str) -> list[int]:
    found: list[int] = CHAT(text, add_special_tokens=False)["input_ids"]
    return found


def load_chat(path: str) -> Recorded:
    return load_recorded([path], CHAT, "{prompt}", vocab_size=len(CHAT), context=None)


@pytest.mark.parametrize(
    ("row", "completion_ids", "finish"),
    [
        ({"completion": "42"}, [*ids("42"), TURN_END], "stop"),
        ({"completion": "42", "finish": "stop"}, [*ids("42"), TURN_END], "stop"),
        ({"completion": "42<|eot_id|>", "finish": "stop"}, [*ids("42"), TURN_END], "stop"),
        ({"completion": "42<|eot_id|>\n"}, [*ids("42"), TURN_END], "stop"),
        ({"completion": "42<|eot_id|><|end_of_text|>"}, [*ids("42"), TURN_END], "stop"),
        # Another end token that the model may have sampled is an end, too.
        ({"completion": "42<|end_of_text|>"}, ids("42<|end_of_text|>"), "stop"),
        ({"completion": "42", "finish": "length"}, ids("42"), "length"),
        ({"completion": "42", "finish_reason": "length"}, ids("42"), "length"),
        ({"completion": "42", "finish_reason": "stop"}, [*ids("42"), TURN_END], "stop"),
        ({"completion": "42", "finish_reason": None}, [*ids("42"), TURN_END], "stop"),
        (
            {"completion": [{"role": "assistant", "content": "42"}]},
            [*ids("42"), TURN_END],
            "stop",
        ),
        # Ids are taken as they are.
        ({"completion": "42", "completion_ids": ids("42")}, ids("42"), "stop"),
    ],
)
def test_recorded_completion_ends_once_with_the_end_of_the_templates_turn(
    row: dict[str, Any], completion_ids: list[int], finish: str, tmp_path: Path
) -> None:
    row = {"prompt": [{"role": "user", "content": "6*7"}], "reward": 1, **row}
    found = load_chat(write(tmp_path / "r.jsonl", row, row))
    ((first, _),) = found.groups
    assert (first.completion_ids, first.finish) == (tuple(completion_ids), finish)
    assert "finish_reason" not in first.columns
    assert found.num_tokenised == (0 if "completion_ids" in row else 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "4<|eot_id|>more"}, "a completion of one turn in .*line 1, got 'more' beh"),
        ({"finish_reason": "abort"}, "stop or length as finish_reason in .*line 1, got 'abort'"),
        ({"finish": "stop", "finish_reason": "length"}, "finish and finish_reason to agree in .*1"),
        ({"finish_reason": 3}, "str as finish_reason in .*line 1, got 3"),
        ({"prompt": [{"role": "user"}]}, "messages with role and content, both text, .*line 1"),
        (
            {"prompt": f"{SPECIAL[0]}6*7"},
            "a question, or a rendered prompt that ends with .*line 1",
        ),
    ],
)
def test_recorded_text_that_cannot_be_taken_is_refused(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "r.jsonl", {"prompt": "6*7", "completion": "4", "reward": 1, **row})
    with pytest.raises(Refusal, match=f"^recorded: expected {message}"):
        load_chat(path)


def test_completion_cannot_be_ended_without_an_end_token(tmp_path: Path) -> None:
    tokenizer = tiny.build_tokenizer()
    tokenizer.eos_token = None
    path = write(tmp_path / "r.jsonl", GOOD, GOOD)
    with pytest.raises(Refusal, match="recorded: expected a tokenizer with an end token for .*1,"):
        load_recorded([path], tokenizer, "{prompt}", vocab_size=15, context=None)


def test_prompt_that_holds_the_chat_template_gets_it_once(tmp_path: Path) -> None:
    plain = {"prompt": "6*7", "completion": "42", "reward": 1}
    ((first, _),) = load_chat(write(tmp_path / "a.jsonl", plain, plain)).groups
    rendered = {**plain, "prompt": first.prompt}
    ((again, _, _),) = load_chat(write(tmp_path / "b.jsonl", rendered, rendered, plain)).groups
    assert again.prompt_ids == first.prompt_ids and first.prompt.startswith(SPECIAL[0])


def test_one_question_with_two_gold_answers_is_refused_or_two_groups(tmp_path: Path) -> None:
    three, four = ({**GOOD, "answer": answer} for answer in ("3", 4))
    message = (
        "expected one gold answer in group '1\\+2=', got '3' and '4' in column answer in .*line 2"
    )
    with pytest.raises(Refusal, match=f"recorded: {message}; give the rows of each answer a group"):
        load([write(tmp_path / "a.jsonl", three, four)])
    ((first, _),) = load([write(tmp_path / "b.jsonl", three, {**three, "answer": 3})]).groups
    assert first.columns == {"answer": "3"}
    named = [{**row, "group": row["answer"]} for row in (three, four, three, four)]
    groups = load([write(tmp_path / "c.jsonl", *named)]).groups
    assert [[r.columns["answer"] for r in group] for group in groups] == [["3", "3"], [4, 4]]
    # gold_column, where it is set, is the only one that tells.
    told = [{**row, "gold": gold} for row, gold in ((three, "3"), (four, "3"))]
    path = write(tmp_path / "e.jsonl", *told)
    ((first, second),) = load([path], gold_column="gold").groups
    assert (first.columns["answer"], second.columns["answer"]) == ("3", 4)
    with pytest.raises(Refusal, match="got '3' and '4' in column answer"):
        load([path])
    # A run's log of a dataset that asks it twice: there the columns are the dataset's.
    logged = [{**GOOD, "group": "a", "columns": {"answer": a}} for a in ("3", "4", "3", "4")]
    groups = load([write(tmp_path / "d.jsonl", *logged)]).groups
    assert [[r.columns["answer"] for r in group] for group in groups] == [["3", "3"], ["4", "4"]]
    assert len({r.group for group in groups for r in group}) == 2


@pytest.mark.parametrize("name", ["r.csv", "r.json", "r.jsonl.gz"])
def test_rollouts_may_be_in_any_kind_of_file(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": "1+2=", "completion": c, "reward": r} for c, r in (("3", 1.0), ("4", 0.0))]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    if name == "r.json":
        content = json.dumps(rows)
    if name == "r.csv":
        content = "prompt,completion,reward,sampling_logprob,finish\n1+2=,3,1.0,,\n1+2=,4,0.0,-2,\n"
    encoded = gzip.compress(content.encode()) if name.endswith(".gz") else content.encode()
    (tmp_path / name).write_bytes(encoded)
    ((right, wrong),) = load([str(tmp_path / name)]).groups
    assert (right.completion, right.reward, wrong.reward) == ("3", 1.0, 0.0)
    assert wrong.sampling_logprob == (-2.0 if name == "r.csv" else None)


TURNS = [
    {"by": "model", "tokens": 2, "text": "3+"},
    {"by": "environment", "tokens": 1, "text": "4"},
    {"by": "model", "tokens": 2, "text": "5"},
]


def of_turns(reward: float, turns: Any = TURNS) -> dict[str, Any]:
    ids = [*TOKENIZER("3+45")["input_ids"], 1]
    prompt = TOKENIZER("1+2=")["input_ids"]
    return {"prompt_ids": prompt, "completion_ids": ids, "reward": reward, "turns": turns}


def test_turns_are_kept_from_log_to_log(tmp_path: Path) -> None:
    ((first, second),) = load([write(tmp_path / "r.jsonl", of_turns(0), of_turns(1))]).groups
    assert first.turns == tuple(TURNS)  # type: ignore[comparison-overlap]
    assert first.sampled == [range(2), range(3, 5)]
    assert first.sampled_ids == (*first.completion_ids[:2], *first.completion_ids[3:])
    log = tmp_path / "log.jsonl"
    write_rollouts(log, [first, replace(second, environment_reward=0.5)])
    once, again = read_rollouts(log)
    assert once == first and again.environment_reward == 0.5
    ((_, loaded),) = load([str(log)]).groups
    assert loaded.turns == first.turns and loaded.environment_reward is None
    assert "turns" not in json.loads(rollout_to_json(rollout("g", [2], [3])))


def test_kept_ids_are_those_of_sampled_tokens(tmp_path: Path) -> None:
    ids = of_turns(0)["completion_ids"]
    sets = [[i, 2] for i in (*ids[:2], *ids[3:])]
    rows = [{**of_turns(reward), "kept_ids": sets} for reward in (0, 1)]
    ((first, _),) = load([write(tmp_path / "r.jsonl", *rows)], truncated=True).groups
    assert [list(s) for s in kept_ids.decode(first.kept_ids or "")] == [sorted(s) for s in sets]
    rows[0]["kept_ids"] = [*sets, [2]]
    with pytest.raises(Refusal, match="5 sets for 4 tokens"):
        load([write(tmp_path / "s.jsonl", *rows)], truncated=True)


@pytest.mark.parametrize(
    "turns",
    [
        TURNS[:2],
        TURNS[1:],
        [*TURNS, TURNS[0]],
        [{**TURNS[0], "tokens": 5}, *TURNS[1:]],
        [TURNS[0], TURNS[0], TURNS[2]],
        [{**TURNS[0], "tokens": 0}, *TURNS[1:]],
        [{"tokens": 5}],
        [TURNS[0], "4", TURNS[2]],
    ],
)
def test_turns_that_are_not_the_completions_are_refused(turns: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", of_turns(1), of_turns(0, turns))
    with pytest.raises(Refusal, match=r"recorded: expected turns .* the 5 of .*, line 2, got \["):
        load([path])


def test_turns_of_text_alone_are_refused_and_another_column_of_that_name_is_the_rewards(
    tmp_path: Path,
) -> None:
    text = {"prompt": "1+2=", "completion": "3", "reward": 1}
    with pytest.raises(Refusal, match="recorded: expected completion_ids beside turns"):
        load([write(tmp_path / "r.jsonl", {**text, "turns": TURNS}, GOOD)])
    other = {**text, "turns": ["one", "two"]}
    ((first, _),) = load([write(tmp_path / "s.jsonl", other, other)]).groups
    assert first.turns is None and first.columns["turns"] == ["one", "two"]
