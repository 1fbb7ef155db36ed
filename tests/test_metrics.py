"""GET /metrics, read by Prometheus' own parser."""

import http.client
import json
import re
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, serve_many, serve_scripted, until

from api_reply import CHAT_SHAPE, Choice, Completion
from engine import Delta
from metrics import CONTENT_TYPE, FAMILIES, PREFIX, SERIES, Metrics, Tally, escaped

parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")


def read(served, **headers):
    """{(name without prefix, labels): value}, after the parser has agreed with the text."""
    status, raw, got = served.request("GET", "/metrics", headers=headers)
    assert status == 200 and got["Content-Type"] == CONTENT_TYPE, raw
    families = list(parser.text_string_to_metric_families(raw.decode()))
    assert [family.name for family in families] == [f"{PREFIX}{name}".removesuffix("_total") for name in FAMILIES]
    assert [family.type for family in families] == [family.kind for family in FAMILIES.values()]
    samples = [sample for family in families for sample in family.samples]
    told = {(s.name.removeprefix(PREFIX), tuple(sorted(s.labels.items()))): s.value for s in samples}
    assert len(told) == len(samples)  # no series twice
    return lambda name, **labels: told.get((name, tuple(sorted(labels.items()))))


def answered(served, times, status=200):
    """A request is counted after its answer has gone."""
    route = {"method": "POST", "route": "/chat/completions", "status": str(status)}
    until(lambda: read(served)("requests_total", **route) == times)


@pytest.fixture
def counting(tmp_path):
    with serve_scripted(tmp_path, slots=1, metrics=Metrics()) as served:
        yield served


def test_answers_are_counted(counting):
    counting.chat("echo abcde")
    counting.stream("echo abc", max_tokens=2, n=2)
    answered(counting, 2)
    told = read(counting)
    assert told("completions_total", model="scripted", finish_reason="stop") == 1
    assert told("completions_total", model="scripted", finish_reason="length") == 2
    assert told("completion_tokens_total", model="scripted") == 6 + 2 * 2
    assert told("prompt_tokens_total", model="scripted") == len("echo abcde") + len("echo abc")
    assert told("cached_tokens_total", model="scripted") == len("echo abcde") % 7 + len("echo abc") % 7
    assert told("request_prompt_tokens_count", model="scripted") == 2
    assert told("request_prompt_tokens_bucket", model="scripted", le="16") == 2
    for name in ("time_to_first_token_seconds", "request_seconds", "queue_seconds"):
        assert told(f"{name}_count", model="scripted") == told(f"{name}_bucket", model="scripted", le="+Inf") == 2
    assert 0 < told("time_to_first_token_seconds_sum", model="scripted") <= told("request_seconds_sum", model="scripted")
    assert told("inter_token_latency_seconds_count", model="scripted") <= 5 + 1 + 1  # less where tokens came together
    assert told("requests_running", model="scripted") == told("requests_waiting", model="scripted") == 0
    assert told("kv_tokens_used", model="scripted") == 0 and told("kv_tokens", model="scripted") == 4096


def test_gaps_are_those_of_one_choice():
    gaps = Tally("inter_token_latency_seconds")
    completion = Completion("x", "m", "f", [Choice(), Choice()], CHAT_SHAPE, gaps=gaps)
    for choice, tokens, at in (
        (0, 1, 10.0),
        (1, 1, 10.0),
        (0, 1, 10.04),
        (1, 1, 10.045),
        (0, 0, 10.1),
        (0, 3, 10.64),
        (1, 1, 10.057),
    ):
        completion.add(Delta(choice, "a", tokens, at=at))
    by_bound = {bound: count for bound, count in zip((*gaps.bounds, None), gaps.counts, strict=True) if count}
    assert by_bound == {0.015: 1, 0.05: 2, 0.25: 3}  # three tokens that came together after 0.6 s: 0.2 s each
    assert gaps.sum == pytest.approx(0.04 + 0.045 + 0.6 + 0.012)


def test_what_runs_and_waits(counting):
    counting.script("hold")
    threads = [threading.Thread(target=counting.chat, args=(f"echo {name}",)) for name in "ab"]
    for thread in threads:
        thread.start()
    both = {"requests_running": 1, "requests_waiting": 1}
    until(lambda: {name: read(counting)(name, model="scripted") for name in both} == both)
    assert read(counting)("slots", model="scripted") == 1
    until(lambda: len(counting.server.metrics.live) == 2)
    time.sleep(0.05)
    counting.script("hold", on=False)
    for thread in threads:
        thread.join()
    answered(counting, 2)
    told = read(counting)
    assert told("requests_running", model="scripted") == told("requests_waiting", model="scripted") == 0
    assert told("queue_seconds_count", model="scripted") == 2 and told("queue_seconds_sum", model="scripted") > 0


def test_kv_tokens_of_a_running_request(counting):
    conn = http.client.HTTPConnection(counting.host, counting.port)
    conn.request(
        "POST", "/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": "forever"}], "stream": True})
    )
    reply = conn.getresponse()
    reply.read(400)
    assert read(counting)("kv_tokens_used", model="scripted") > len("forever")
    conn.close()
    reply.close()
    until(lambda: read(counting)("cancelled_total", route="/chat/completions") == 1)
    told = read(counting)
    assert told("requests_total", method="POST", route="/chat/completions", status="499") == 1
    assert told("completions_total", model="scripted", finish_reason="aborted") == 1
    assert told("kv_tokens_used", model="scripted") == 0


def test_refusals_restarts_and_memory(counting):
    counting.chat("x", temperature=9)
    counting.chat("x" * 3000)
    answered(counting, 2, 400)
    assert b"finish_reason=" not in counting.request("GET", "/metrics")[1]  # nothing was begun
    counting.request("GET", "/nonsense")
    counting.chat("die")
    counting.wait_ready()
    answered(counting, 1, 500)
    told = read(counting)
    assert told("refused_total", code="invalid_request") == told("refused_total", code="context_length_exceeded") == 1
    assert told("refused_total", code="unknown_url") == told("requests_total", method="GET", route="other", status="404") == 1
    assert told("engine_restarts_total", model="scripted") == 1
    assert told("resident_memory_bytes", process="server", model="") > 1 << 20
    assert told("resident_memory_bytes", process="engine", model="scripted") > 1 << 20


def test_models_by_state(tmp_path):
    with serve_many(tmp_path, ["one", "two"], load_wait=60) as served:
        served.server.metrics = Metrics()
        served.chat("echo x", model="one")
        told = read(served)
        assert told("models", state="loaded") == told("models", state="unloaded") == 1
        assert told("models", state="failed") == told("models", state="loading") == 0


def test_only_with_the_flag_and_with_the_key(tmp_path):
    with serve_scripted(tmp_path, api_key="secret") as served:
        status, body, _ = served.request("GET", "/metrics", headers={"Authorization": "Bearer secret"})
        assert status == 404 and body["error"]["code"] == "metrics_off"
        served.server.metrics = Metrics()
        assert served.request("GET", "/metrics")[0] == 401
        assert read(served, Authorization="Bearer secret")("refused_total", code="invalid_api_key") == 1


def test_a_name_is_told_whatever_it_holds():
    assert escaped('a"b\\c\nd') == r"a\"b\\c\nd"
    line = f'x{{model="{escaped(chr(34) + chr(92) + chr(10))}"}} 1\n'
    ((family,),) = [list(parser.text_string_to_metric_families(line))]
    assert family.samples[0].labels == {"model": '"\\\n'}


def test_what_comes_from_outside_does_not_fill_the_memory():
    metrics = Metrics()
    for i in range(2 * SERIES):
        metrics.count("refused_total", f"code{i}")
    series = metrics.counters["refused_total"]
    assert len(series) <= SERIES + 1 and series["other",] == SERIES and sum(series.values()) == 2 * SERIES


@pytest.mark.parametrize("value, bucket", [(0.0, 0), (0.001, 0), (0.0011, 1), (2.5, 15), (99.0, 16)])
def test_a_bound_belongs_to_its_bucket(value, bucket):
    tally = Tally("inter_token_latency_seconds")
    tally.observe(value, 3)
    assert tally.counts[bucket] == sum(tally.counts) == 3 and tally.sum == pytest.approx(3 * value)


def test_the_docs_and_the_dashboard_know_the_names():
    told = (ROOT / "docs" / "metrics.md").read_text()
    for name, family in FAMILIES.items():
        assert (
            f"| `{PREFIX}{name}` | {family.kind} | {', '.join(f'`{label}`' for label in family.labels)} | {family.help}" in told
        )
    dashboard = json.loads(Path(ROOT / "examples" / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        for name in re.findall(rf"{PREFIX}\w+", target["expr"])
    }
    known = {f"{PREFIX}{name}{end}" for name in FAMILIES for end in ("", "_bucket", "_sum", "_count")}
    assert asked <= known and len(asked) >= 15
