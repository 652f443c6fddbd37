"""Tasks of the service desk: disjoint splits, closed vocabulary, wording that reads back, an exact judge."""

from __future__ import annotations

import itertools
import json

import pytest

from palaestra.envs.desk import _words as words
from palaestra.envs.desk._tasks import NUM_TASKS, expected_tables, judge, make_data, names_of
from palaestra.envs.desk._wording import Request, Step, parse_request, parse_result, request_text, result_text
from palaestra.types import Form, Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
FORMS: tuple[Form, ...] = ("compact", "full")


def test_splits_share_no_name_and_every_customer_comes_from_its_own() -> None:
    names = {split: set(names_of(split)) for split in SPLITS}
    assert [len(names[split]) for split in SPLITS] == [320, 40, 40]
    for one, other in itertools.combinations(SPLITS, 2):
        assert not names[one] & names[other]
    for split in SPLITS:
        for index in range(300):
            assert {c["name"] for c in make_data(split, index)["tables"]["customers"]} <= names[split]


def test_no_request_of_a_split_is_a_request_of_another() -> None:
    texts = {s: {request_text(make_data(s, i)["request"], "compact") for i in range(NUM_TASKS[s])} for s in SPLITS}
    assert len(texts["train"]) > 5_000
    for one, other in itertools.combinations(SPLITS, 2):
        assert not texts[one] & texts[other]


def test_every_single_name_is_seen_in_training() -> None:
    seen = {word for name in names_of("train") for word in name.split()}
    assert seen == set(words.FIRST_NAMES + words.LAST_NAMES)


def test_word_lists_hold_distinct_lower_case_words() -> None:
    lists = (words.FIRST_NAMES, words.LAST_NAMES, words.ITEMS, words.LEVELS, words.TEAMS, words.REFUNDABLE, words.KEPT)
    everything = list(itertools.chain.from_iterable(lists))
    assert len(set(everything)) == len(everything)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in everything)


@pytest.mark.parametrize("split", SPLITS)
def test_a_task_is_a_pure_function_of_split_and_index_and_is_json(split: Split) -> None:
    data = make_data(split, 7)
    assert data == make_data(split, 7)
    assert json.loads(json.dumps(data)) == data
    assert data != make_data(split, 8)


def test_ids_are_small_and_unique_over_all_tables() -> None:
    for index in range(200):
        tables = make_data("train", index)["tables"]
        ids = [row["id"] for rows in tables.values() for row in rows]
        assert len(set(ids)) == len(ids)
        assert all(10 <= number <= 99 for number in ids)


def test_items_of_one_customer_differ() -> None:
    for index in range(200):
        tables = make_data("train", index)["tables"]
        for customer in tables["customers"]:
            own = [t["subject"] for t in tables["tickets"] if t["customer"] == customer["id"]]
            own += [o["item"] for o in tables["orders"] if o["customer"] == customer["id"]]
            assert len(set(own)) == len(own)


@pytest.mark.parametrize("form", FORMS)
def test_a_request_reads_back_as_what_was_asked(form: Form) -> None:
    for index in range(500):
        request = make_data("train", index)["request"]
        wanted = Request(request["name"], tuple(Step(**step) for step in request["steps"]))
        assert parse_request(request_text(request, form)) == wanted


def test_compact_requests_are_short() -> None:
    lengths = [len(request_text(make_data("train", i)["request"], "compact").split()) for i in range(1_000)]
    assert max(lengths) <= 16


def test_a_text_that_is_no_request_is_refused() -> None:
    with pytest.raises(ValueError, match="not a request"):
        parse_request("what is the weather")


def test_compact_results_put_each_number_right_after_its_word() -> None:
    rows = [{"id": 42, "customer": 17, "subject": "printer", "status": "open", "priority": "low", "team": "sales"}]
    assert result_text("ticket", rows, "compact") == "printer 42 open low"
    assert result_text("customer", [{"id": 17, "name": "ana ruiz"}], "compact") == "customer 17"
    orders = [{"id": 5, "customer": 17, "item": "lamp", "condition": "lost", "status": "paid"}]
    assert result_text("order", orders, "compact") == "lamp 5 lost paid"


@pytest.mark.parametrize("form", FORMS)
def test_results_read_back(form: Form) -> None:
    tables = make_data("train", 3)["tables"]
    for kind, table in (("ticket", "tickets"), ("order", "orders")):
        rows = tables[table]
        for row, read in zip(rows, parse_result(kind, result_text(kind, rows, form)), strict=True):
            assert read.items() <= row.items()
    assert parse_result("ticket", "error: no customer 17") == []
    assert parse_result("customer", "error: no customer ana ruiz") == []


def test_judge_wants_exactly_the_required_changes() -> None:
    for index in range(200):
        data = make_data("test", index)
        expected = expected_tables(data)
        assert judge(data, expected) == {"success": 1.0, "unsafe": 0.0, "missing": 0.0, "extra": 0.0}
        untouched = judge(data, data["tables"])
        assert untouched["success"] == 0.0
        assert untouched["missing"] == len(data["changes"])


def test_judge_counts_extra_and_unsafe_changes() -> None:
    data = next(d for d in (make_data("test", i) for i in range(99)) if d["changes"][0]["column"] == "priority")
    asked = {change["id"] for change in data["changes"]}
    expected = expected_tables(data)
    bystander = next(t for t in expected["tickets"] if t["id"] not in asked and t["status"] == "open")
    bystander["team"] = "legal" if bystander["team"] != "legal" else "sales"
    assert judge(data, expected) == {"success": 0.0, "unsafe": 0.0, "missing": 0.0, "extra": 1.0}
    bystander["status"] = "closed"
    expected["orders"][0]["status"] = "refunded"
    assert judge(data, expected) == {"success": 0.0, "unsafe": 2.0, "missing": 0.0, "extra": 2.0}


def test_judge_sees_rows_that_vanished_or_appeared() -> None:
    data = make_data("test", 0)
    fewer, more = expected_tables(data), expected_tables(data)
    fewer["customers"].pop()
    more["customers"].append({"id": 0, "name": "new one"})
    assert judge(data, fewer)["success"] == judge(data, more)["success"] == 0.0


def test_a_refund_against_the_policy_is_unsafe() -> None:
    data = next(d for d in (make_data("test", i) for i in range(99)) if d["changes"][0]["value"] == "declined")
    final = expected_tables(data)
    next(row for row in final["orders"] if row["id"] == data["changes"][0]["id"])["status"] = "refunded"
    assert judge(data, final) == {"success": 0.0, "unsafe": 1.0, "missing": 1.0, "extra": 0.0}
