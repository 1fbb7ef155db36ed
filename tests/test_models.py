"""Many models: finding and naming them, and the life of each, with scripted engines."""

import contextlib
import gc
import json
import os
import random
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from conftest import from_client, serve, serve_many, sse, threads_alive, until

import access
import catalog as catalog_room
import model_init
import openai_api_endpoint as endpoint
from catalog import COMPLETE, OSAURUS_NAMES, Catalog, Model, UsageError, choose_backend
from engine import EngineSpec
from model_init import PROFILES, Life

IR = [group[0] for group in COMPLETE["openvino"]]
HF = ["config.json", "tokenizer.json", "model.safetensors"]


def write_gguf(path, architecture="llama"):
    path.parent.mkdir(parents=True, exist_ok=True)
    name, value = b"general.architecture", architecture.encode()
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    path.write_bytes(header + struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, len(value)) + value)


def write_files(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def listed(root):
    return list(Catalog(root).models())


# ── finding ──


def test_every_complete_model_is_listed_and_no_other(tmp_path, caplog):
    write_gguf(tmp_path / "plain.Q4_K_M.gguf")
    write_gguf(tmp_path / "folder" / "weights.gguf")
    write_gguf(tmp_path / "org" / "repo" / "x.gguf")
    for name in ("two/a.gguf", "two/b.gguf", "two/mmproj-a.gguf", "whole-00001-of-00002.gguf", "whole-00002-of-00002.gguf"):
        write_gguf(tmp_path / name)
    write_files(tmp_path / "ir", IR)
    write_files(tmp_path / "mlx-community" / "Llama-3.2-3B-Instruct-4bit", HF)
    expected = ["a", "b", "folder", "ir", "mlx-community/Llama-3.2-3B-Instruct-4bit", "org/repo", "plain.Q4_K_M", "whole"]

    write_gguf(tmp_path / "half-00001-of-00002.gguf")
    write_files(tmp_path / "hf-parts", ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"])
    write_files(tmp_path / "hf-weightless", ["config.json", "tokenizer.json"])
    write_files(tmp_path / "notes", ["README.md"])
    write_gguf(tmp_path / "too" / "deep" / "down" / "x.gguf")
    write_gguf(tmp_path / ".hidden" / "x.gguf")
    (tmp_path / "junk.gguf").write_bytes(b"no model")
    assert listed(tmp_path) == expected
    told = [record.getMessage() for record in caplog.records]
    for path, lack in (
        ("half-00001-of-00002.gguf", "half-00002-of-00002.gguf"),
        ("hf-parts", "model-00002-of-00002.safetensors"),
        ("hf-weightless", "*.safetensors"),
        ("junk.gguf", "does not begin with GGUF"),
    ):
        assert [line for line in told if f"/{path}: not listed" in line and lack in line], (path, told)


@pytest.mark.parametrize("lack", IR + HF)
def test_one_file_less_and_it_is_not_listed(lack, tmp_path):
    write_files(tmp_path / "m", IR if lack in IR else HF)
    assert listed(tmp_path) == ["m"]
    (tmp_path / "m" / lack).unlink()
    assert listed(tmp_path) == []


def test_new_and_removed_files_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(Catalog, "RESCAN_S", 0.0)
    catalog = Catalog(tmp_path)
    assert not catalog.models()
    for trust in (2.0, 0.0):  # in the time in which a folder's mtime is not trusted yet, and after it
        monkeypatch.setattr(Catalog, "TRUST_S", trust)
        write_files(tmp_path / "ir", IR[:-1])
        assert not catalog.models()
        time.sleep(0.02)
        (tmp_path / "ir" / IR[-1]).touch()
        assert list(catalog.models()) == ["ir"]
        (tmp_path / "growing.gguf").write_bytes(b"GG")
        assert list(catalog.models()) == ["ir"]
        write_gguf(tmp_path / "growing.gguf")  # in place: the folder's mtime stays
        assert list(catalog.models()) == ["growing", "ir"]
        time.sleep(0.02)
        (tmp_path / "growing.gguf").unlink()
        (tmp_path / "ir" / IR[-1]).unlink()
        assert not catalog.models()


def test_a_name_just_made_is_found_at_once(tmp_path, monkeypatch):
    catalog = Catalog(tmp_path)
    catalog.scanned -= 1
    write_gguf(tmp_path / "new.gguf")
    assert catalog.find("new").id == "new"


def test_links_and_names_that_lead_out_are_not_followed(tmp_path, caplog):
    root = tmp_path / "models"
    write_files(tmp_path / "outside", IR)
    write_files(root / "inside", IR)
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "in").symlink_to(root / "inside")
    (root / "nowhere").symlink_to(root / "nothing")
    write_files(root / "patched", IR[1:])
    (root / "patched" / IR[0]).symlink_to(tmp_path / "outside" / IR[0])
    catalog = Catalog(root)
    assert list(catalog.models()) == ["in", "inside"]
    for name in ("../outside", "out", str(root / "inside"), "inside/../inside", "./inside", "", "inside/", "nowhere"):
        assert catalog.find(name) is None, name
    assert "is not followed" in caplog.text


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["Llama-3.2-1B-Instruct.Q4_K_M.gguf"], {
            "Llama-3.2-1B-Instruct.Q4_K_M": 0, "Llama-3.2-1B-Instruct.Q4_K_M.gguf": 0, "Llama-3.2-1B-Instruct": 0,
            "llama-3.2-1b-instruct": 0, "LLAMA-3.2-1B-INSTRUCT.q4_k_m.GGUF": 0, "Llama-3.2-1B-Instruct.Q8_0": None, "Llama": None,
        }),
        (["M.Q4_0.gguf", "M.Q8_0.gguf"], {"M.Q4_0": 0, "m.q8_0.gguf": 1, "M": None}),
        (["M.gguf", "M.Q8_0.gguf"], {"M": 0, "M.Q8_0": 1, "m.q8_0": 1, "m": None}),
        (["mlx-community/Llama-3.2-1B-Instruct-4bit/x.gguf", "mlx-community/Qwen2.5-3B-Instruct-4bit/y.gguf"], {
            "mlx-community/Llama-3.2-1B-Instruct-4bit": 0, "llama-3.2-1b-instruct": 0, "Llama-3.2-1B-Instruct-4bit": 0,
            "qwen2.5-3b-instruct": 1, "mlx-community": None, "x": 0,
        }),
        (["a/r/x.gguf", "b/r/x.gguf"], {"a/r": 0, "b/r": 1, "r": None}),
    ],
)  # fmt: skip
def test_the_names_that_a_model_answers_to(files, names, tmp_path):
    for name in files:
        write_gguf(tmp_path / name)
    catalog = Catalog(tmp_path)
    for name, index in names.items():
        found = catalog.find(name)
        assert (found and found.path) == (None if index is None else tmp_path / files[index]), name


def test_the_eight_names_of_osaurus(tmp_path):
    for name in OSAURUS_NAMES:
        write_gguf(tmp_path / name / "m.gguf")
    catalog = Catalog(tmp_path, osaurus=True)
    assert {catalog.public(model) for model in catalog.models().values()} == set(OSAURUS_NAMES.values())
    assert len(OSAURUS_NAMES) == 8


def test_a_file_and_a_folder_of_one_name(tmp_path):
    write_files(tmp_path / "m", IR)
    write_gguf(tmp_path / "m.gguf")
    assert len(listed(tmp_path)) == 2


def test_which_engine_loads_what(tmp_path, monkeypatch):
    """The table in README; an engine that is asked for and cannot load a model names those that can."""
    write_files(tmp_path / "hf", HF)
    write_files(tmp_path / "exl3", HF)
    (tmp_path / "exl3" / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "exl3"}}'
    )
    write_files(tmp_path / "ir", IR)
    write_gguf(tmp_path / "llama.gguf", architecture="llama")
    write_gguf(tmp_path / "other.gguf", architecture="gemma3")
    models = Catalog(tmp_path).models()
    monkeypatch.setattr(catalog_room, "missing_library", lambda name: None)
    monkeypatch.setattr(catalog_room, "fits_exllamav3", lambda folder, architecture: False)
    chosen = {name: choose_backend(model, "auto") for name, model in models.items()}
    assert chosen == {"hf": "transformers", "exl3": "exllamav3", "ir": "openvino", "llama": "llamacpp", "other": "llamacpp"}
    monkeypatch.setattr(catalog_room, "fits_exllamav3", lambda folder, architecture: True)
    assert choose_backend(models["hf"], "auto") == "exllamav3"
    monkeypatch.setattr(
        catalog_room, "missing_library", lambda name: "no " + name if name in ("llamacpp", "exllamav3") else None
    )
    assert [choose_backend(models[name], "auto") for name in ("hf", "llama")] == ["transformers", "openvino"]
    for name, asked, says in (
        ("hf", "llamacpp", "backend llamacpp cannot load a Hugging Face folder; exllamav3 and transformers can"),
        ("exl3", "transformers", "an EXL3 folder of architecture LlamaForCausalLM; exllamav3 can"),
        ("ir", "llamacpp", "an OpenVINO IR folder; openvino can"),
        ("other", "openvino", "a GGUF file of architecture gemma3; llamacpp can"),
        ("other", "auto", "^no llamacpp$"),
        ("exl3", "auto", "^no exllamav3$"),
    ):
        with pytest.raises(UsageError, match=says):
            choose_backend(models[name], asked)


@pytest.mark.parametrize(
    "config", ['{"architectures": "x", "quantization_config": 3}', "[]", "no json", '{"architectures": []}']
)
def test_an_odd_config_json_is_a_model_all_the_same(tmp_path, config):
    write_files(tmp_path / "m", HF)
    (tmp_path / "m" / "config.json").write_text(config)
    assert Catalog(tmp_path).models()["m"].kind == "hf"


def test_two_thousand_folders(tmp_path):
    """No time is asserted: what may not grow with the folders is the number of files opened when nothing has changed."""
    for i in range(2000):
        write_files(tmp_path / f"m{i}", IR)
        os.utime(tmp_path / f"m{i}", (1, 1))
    os.utime(tmp_path, (1, 1))
    catalog = Catalog(tmp_path)
    assert len(catalog.models()) == 2000
    before = {path: id(entry[1]) for path, entry in catalog.folders.items()}
    catalog.scan()
    assert {path: id(entry[1]) for path, entry in catalog.folders.items()} == before


# ── the life of a model ──

STATES = list(model_init.MOVES)
LEGAL = {
    ("unloaded", "loading"), ("loading", "loaded"), ("loading", "failed"), ("loading", "loading"), ("loaded", "draining"),
    ("loaded", "loading"), ("loaded", "failed"), ("draining", "unloaded"), ("failed", "loading"),
}  # fmt: skip


@pytest.mark.parametrize("to", STATES)
@pytest.mark.parametrize("state", STATES)
def test_moves(state, to):
    life = Life(Model("m", Path("m"), "gguf", 0))
    life.state = state
    if (state, to) in LEGAL:
        life.move(to)
        assert life.state == to
    else:
        with pytest.raises(RuntimeError, match=f"{state} to {to}"):
            life.move(to)


def ask(served, model, text="echo hi", **fields):
    return served.chat(text, model=model, max_tokens=10, **fields)


def statuses(served):
    return {card["id"]: card["status"] for card in served.request("GET", "/v1/models")[1]["data"]}


def healthz(served):
    status, body, _ = served.request("GET", "/healthz")
    assert status == 200
    return body


def loaded(served, model):
    until(lambda: ask(served, model)[0] == 200)


def in_background(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def test_202_until_the_model_is_loaded(tmp_path):
    with serve_many(tmp_path, "ab") as served:
        assert served.request("GET", "/health")[0] == 200  # nothing is loaded, on purpose: the next request brings it
        (served.at["a"] / "slow").touch()
        for stream in (False, True):
            status, body, headers = ask(served, "a", stream=stream)
            assert (status, headers["Retry-After"]) == (202, "2")
            assert body == {
                "object": "model.load", "status": "spinning_up", "model": "a", "current_model": None,
                "retry_after_seconds": 2, "eta_seconds": None,
            }  # fmt: skip
        assert statuses(served) == {"a": "loading", "b": "unloaded"}
        assert served.request("GET", "/health")[0] == 503
        assert healthz(served)["status"] == "starting"
        (served.at["a"] / "slow").unlink()
        loaded(served, "a")
        assert statuses(served) == {"a": "loaded", "b": "unloaded"}
        assert served.request("GET", "/v1/models/a")[1]["loaded"] is True
        assert set(healthz(served)) == {
            "status", "loaded", "model_id", "inference_backend", "queue_depth", "switch_in_progress", "switch_target_model"
        }  # fmt: skip
        assert (healthz(served)["status"], healthz(served)["model_id"], healthz(served)["loaded"]) == ("ok", "a", True)


@pytest.mark.parametrize("header", [{"Prefer": "wait=60"}, {"Prefer": "respond-async, wait=60"}, None])
def test_waiting_instead(header, tmp_path):
    with serve_many(tmp_path, "ab", load_wait=None if header else 60) as served:
        for model in "aba":
            status, body, headers = ask(served, model, headers=header)
            assert (status, body["choices"][0]["message"]["content"]) == (200, "hi")
            assert headers["Preference-Applied"] == ("wait=60" if header else None)


def test_switching(tmp_path):
    """The old model serves on until it has nothing to do; the target is 202, a third 409; then the old one has left."""
    with serve_many(tmp_path, "abc", slots=1, queue=3) as served:
        loaded(served, "a")
        (served.at["a"] / "hold").touch()
        answers = []
        busy = in_background(lambda: answers.append(ask(served, "a", "echo first")))
        until(lambda: served.models.running() == 1)
        assert ask(served, "b")[1]["current_model"] == "a"
        assert statuses(served) == {"a": "loaded", "b": "loading", "c": "unloaded"}
        health = healthz(served)
        assert (health["status"], health["switch_in_progress"], health["switch_target_model"]) == ("switching", True, "b")
        assert (health["model_id"], health["loaded"]) == ("a", True)
        status, body, headers = ask(served, "c")
        assert (status, body["error"]["current_model"], headers["Retry-After"]) == (409, "a", "2")
        busy += in_background(lambda: answers.append(ask(served, "a", "echo second")))  # the old one goes on being served
        until(lambda: served.models.running() == 2)
        (served.at["a"] / "hold").unlink()
        for thread in busy:
            thread.join()
        assert [answer[0] for answer in answers] == [200, 200]
        loaded(served, "b")
        assert statuses(served) == {"a": "unloaded", "b": "loaded", "c": "unloaded"}
        assert (served.at["a"] / "log").read_text().splitlines()[-1] == "close"
        assert not healthz(served)["switch_in_progress"]


def test_the_switch_deadline(tmp_path):
    """A model that is never idle leaves after the deadline: what runs is finished, what waits is told, what comes gets 409."""
    with serve_many(tmp_path, "ab", slots=1, queue=3, switch_deadline=0.3) as served:
        loaded(served, "a")
        (served.at["a"] / "hold").touch()
        answers = {}

        def asking(name):
            answers[name] = ask(served, "a", f"echo {name}")

        threads = in_background(lambda: asking("running"))
        until(lambda: served.models.lives["a"].engine.queue_depth() == 0 and served.models.running() == 1)
        threads += in_background(lambda: asking("waiting"))
        until(lambda: served.models.running() == 2)
        assert ask(served, "b")[0] == 202
        until(lambda: served.models.lives["a"].state == "draining")
        status, body, _ = ask(served, "a")
        assert (status, body["error"]["code"]) == (409, "model_conflict")
        assert served.request("GET", "/health")[0] == 503
        time.sleep(0.3)  # an engine that was closed too early would show it now
        (served.at["a"] / "hold").unlink()
        for thread in threads:
            thread.join()
        assert answers["running"][0] == 200
        assert (answers["waiting"][0], answers["waiting"][1]["error"]["code"]) == (409, "model_swapped")
        loaded(served, "b")


def test_a_load_that_fails_brings_the_old_model_back(tmp_path):
    with serve_many(tmp_path, "ab") as served:
        loaded(served, "a")
        (served.at["b"] / "fail").touch()
        assert ask(served, "b")[0] == 202
        until(lambda: statuses(served)["a"] == "loaded" and statuses(served)["b"] == "failed")
        assert ask(served, "a")[0] == 200
        health = healthz(served)
        assert (health["status"], health["model_id"]) == ("degraded", "a")
        assert "the script says: no" in health["last_error"]
        status, body, headers = ask(served, "b")
        assert (status, headers["Retry-After"]) == (503, "2")
        assert "the script says: no" in body["error"]["message"]
        (served.at["b"] / "fail").unlink()
        served.models.lives["b"].since -= model_init.HOLD_S  # a while later it is tried afresh
        assert ask(served, "b")[0] == 202
        loaded(served, "b")
        assert healthz(served)["status"] == "ok"


def test_a_failure_is_told_to_everyone_who_was_promised(tmp_path):
    with serve_many(tmp_path, "ab") as served:
        (served.at["b"] / "fail").touch()
        keys = [from_client(i) for i in range(3)]
        (served.at["b"] / "slow").touch()
        assert [ask(served, "b", headers=key)[0] for key in keys] == [202] * 3
        (served.at["b"] / "slow").unlink()
        until(lambda: statuses(served)["b"] == "failed")
        served.models.lives["b"].since -= 60
        assert [ask(served, "b", headers=key)[0] for key in keys] == [503] * 3
        assert ask(served, "b", headers=keys[0])[0] == 202


def test_a_promised_model_stays_for_its_client(tmp_path):
    """A client that polls every two seconds would never see its model if another could have it unloaded at once."""
    with serve_many(tmp_path, "ab") as served:
        loaded(served, "a")
        assert ask(served, "b", headers=from_client(1))[0] == 202
        until(lambda: statuses(served)["b"] == "loaded")
        assert ask(served, "a", headers=from_client(2))[0] == 202
        time.sleep(0.3)
        assert ask(served, "b", headers=from_client(1))[0] == 200
        loaded(served, "a")


def test_several_in_memory_and_the_least_used_leaves(tmp_path):
    with serve_many(tmp_path, "abc", max_loaded=2, load_wait=60) as served:
        for model in "aba":
            assert ask(served, model)[0] == 200
        assert statuses(served) == {"a": "loaded", "b": "loaded", "c": "unloaded"}
        assert ask(served, "c")[0] == 200
        assert statuses(served) == {"a": "loaded", "b": "unloaded", "c": "loaded"}


def test_idle_models_are_unloaded(tmp_path):
    with serve_many(tmp_path, "ab", idle_unload=1, load_wait=60) as served:
        pid = ask(served, "a") and served.models.lives["a"].engine.process.pid
        until(lambda: statuses(served)["a"] == "unloaded")
        assert not Path(f"/proc/{pid}").exists()  # and with the process goes all that it held
        assert served.request("GET", "/health")[0] == 200
        assert ask(served, "a")[0] == 200


def test_a_model_whose_files_go_leaves(tmp_path, monkeypatch):
    with serve_many(tmp_path, "ab", load_wait=60) as served:
        assert ask(served, "a")[0] == 200
        monkeypatch.setattr(served.models.catalog, "RESCAN_S", 0.1)
        monkeypatch.setattr(served.models.catalog, "found", {"b": served.models.catalog.found["b"]})
        until(lambda: served.models.lives["a"].state == "unloaded")
        assert list(statuses(served)) == ["b"]


def test_an_engine_that_dies_while_it_is_switched_away(tmp_path):
    with serve_many(tmp_path, "ab") as served:
        loaded(served, "a")
        (served.at["a"] / "hold").touch()
        busy = in_background(lambda: ask(served, "a", "echo x"))
        until(lambda: served.models.running() == 1)
        assert ask(served, "b")[0] == 202
        served.models.lives["a"].engine.process.kill()
        loaded(served, "b")
        busy[0].join()
        assert statuses(served)["a"] in ("failed", "unloaded")


def test_a_switch_that_goes_wrong_on_both_sides(tmp_path):
    """The old engine dies, then the new one cannot be loaded: the old model comes back."""
    with serve_many(tmp_path, "ab") as served:
        loaded(served, "a")
        (served.at["a"] / "hold").touch()
        (served.at["b"] / "fail").touch()
        busy = in_background(lambda: ask(served, "a", "echo x"))
        until(lambda: served.models.running() == 1)
        assert ask(served, "b")[0] == 202
        served.models.lives["a"].engine.process.kill()
        (served.at["a"] / "hold").unlink()
        busy[0].join()
        until(lambda: statuses(served) == {"a": "loaded", "b": "failed"})
        assert ask(served, "a")[0] == 200


def test_a_model_that_was_ready_once_and_cannot_be_loaded_again(tmp_path):
    """Its load is told as failed, and the switch to it ends."""
    with serve_many(tmp_path, "ab") as served:
        loaded(served, "a")
        life = served.models.lives["a"]
        life.pause = 60  # as after many crashes: it waits for a restart while another is loaded
        life.engine.process.kill()
        until(lambda: life.state == "failed")
        loaded(served, "b")
        life.restart_at, life.since = 0.0, 0.0
        (served.at["a"] / "fail").touch()
        assert ask(served, "a")[0] == 202
        until(lambda: statuses(served) == {"a": "failed", "b": "loaded"} and not served.models.switch)
        assert served.request("GET", "/health")[0] == 200


def test_what_is_not_of_one_model_needs_no_model(tmp_path):
    with serve_many(tmp_path, "ab", absent="refuse") as served:
        assert served.request("GET", "/v1/capabilities")[0] == 200
        assert served.request("GET", "/v1/capabilities?model=b")[0] == 200
        assert served.request("GET", "/v1/capabilities?model=x")[1]["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("limits", "name", "status"),
    [
        ({}, "x", 404), ({"unknown": "400"}, "x", 400), ({"unknown": "404"}, "x", 404), ({"unknown": "serve"}, "x", 200),
        ({}, None, 200), ({"absent": "refuse"}, None, 400), ({"default": "b"}, None, 200), ({"unknown": "serve"}, "B.gguf", 200),
    ],
)  # fmt: skip
def test_models_that_are_unknown_or_not_named(limits, name, status, tmp_path):
    with serve_many(tmp_path, "ab", load_wait=60, **limits) as served:
        got, body, _ = served.chat("echo hi", model=name, max_tokens=9)
        assert got == status
        if status == 200:
            expected = "b" if "b" in (limits.get("default"), str(name)[0].lower()) else "a"
            assert (body["model"], statuses(served)[expected]) == (name or expected, "loaded")
        else:
            assert body["error"]["param"] == "model"
        # what is wrong with the request itself is told first
        assert served.chat("echo hi", model=name, max_tokens=-1)[1]["error"]["param"] == "max_tokens"


def test_operators_routes(tmp_path):
    with serve_many(tmp_path, "ab") as served:
        status, body, _ = served.request("POST", "/v1/models/load", {"model": "a"})
        assert (status, body) == (200, {"object": "model.load", "status": "loaded", "model": "a"})
        (served.at["b"] / "slow").touch()
        threading.Timer(0.5, (served.at["b"] / "slow").unlink).start()
        status, raw, _ = served.request("POST", "/models/load", {"model": "b", "stream": True})
        events = sse(raw)
        assert status == 200 and [e["status"] for e in events][-1] == "loaded" and len(events) > 1
        assert [e["progress"] for e in events] == sorted(e["progress"] for e in events)
        assert {"loading"} == {e["status"] for e in events[:-1]}
        assert statuses(served) == {"a": "unloaded", "b": "loaded"}
        status, body, _ = served.request("POST", "/v1/models/unload", {"model": "b"})
        assert (status, body) == (200, {"object": "model.unload", "status": "unloaded", "model": "b"})
        assert statuses(served) == {"a": "unloaded", "b": "unloaded"}
        (served.at["a"] / "fail").touch()
        assert served.request("POST", "/v1/models/load", {"model": "a"})[0] == 503
        served.models.lives["a"].since -= 60
        (served.at["a"] / "slow").touch()
        threading.Timer(0.5, (served.at["a"] / "slow").unlink).start()
        events = sse(served.request("POST", "/v1/models/load", {"model": "a", "stream": True})[1])
        assert "the script says: no" in events[-1]["error"]["message"]
        for admin, headers, status in (
            (None, {}, 403), ("key", {}, 401), ("key", {"Authorization": "Bearer key"}, 200), ("", {}, 200)
        ):  # fmt: skip
            served.server.access.admin = None if admin is None else access.Keys([admin] if admin else [])
            assert served.request("POST", "/v1/models/unload", {"model": "b"}, headers)[0] == status


def sent(served, jobs):
    """So many jobs, and each has been sent to the engine."""
    engine = served.models.engine
    return len(engine.jobs) == jobs and all(job.posted for job in list(engine.jobs.values())) and not engine.outbox.messages


def test_one_clients_many_do_not_starve_anothers_one(tmp_path):
    with serve_many(tmp_path, "a", slots=2, queue=40) as served:
        (served.at["a"] / "hold").touch()
        loaded_first = in_background(lambda: ask(served, "a", "echo warm"))
        until(lambda: served.models.running() == 1)
        many = in_background(*[lambda i=i: ask(served, "a", f"echo many{i}", headers=from_client(1)) for i in range(30)])
        until(lambda: served.models.running() == 31)
        few = in_background(lambda: ask(served, "a", "echo few", headers=from_client(2)))
        until(lambda: sent(served, 32))
        time.sleep(0.1)
        (served.at["a"] / "hold").unlink()
        for thread in loaded_first + many + few:
            thread.join()
        starts = [line.split()[3] for line in served.calls() if line.startswith("start")]
        assert len(starts) == 32
        assert starts.index("few") <= 4, starts


def test_with_one_slot_clients_take_turns(tmp_path):
    with serve_many(tmp_path, "a", slots=1, queue=40) as served:
        loaded(served, "a")
        (served.at["a"] / "hold").touch()
        many = in_background(*[lambda i=i: ask(served, "a", f"echo many{i}", headers=from_client(1)) for i in range(20)])
        until(lambda: served.models.running() == 20)
        few = in_background(lambda: ask(served, "a", "echo few", headers=from_client(2)))
        until(lambda: sent(served, 21))
        time.sleep(0.1)
        (served.at["a"] / "hold").unlink()
        for thread in many + few:
            thread.join()
        starts = [line.split()[3] for line in served.calls() if line.startswith("start") and "hi" not in line]
        assert starts.index("few") <= 2, starts


def test_a_client_that_fills_the_queue_gives_way(tmp_path):
    """The last place of whoever has most goes to one that has nothing; among equals the queue is just full."""
    with serve_many(tmp_path, "a", slots=1, queue=4) as served:
        loaded(served, "a")
        (served.at["a"] / "hold").touch()
        answers = []
        threads = in_background(
            *[lambda: answers.append(ask(served, "a", "echo x", headers=from_client(1))[0]) for _ in range(5)]
        )
        until(lambda: served.models.running() == 5)
        assert ask(served, "a", headers=from_client(1))[0] == 429
        few = []
        threads += in_background(lambda: few.append(ask(served, "a", "echo few", headers=from_client(2))[0]))
        until(lambda: answers == [429])
        (served.at["a"] / "hold").unlink()
        for thread in threads:
            thread.join()
        assert (sorted(answers), few) == ([200] * 4 + [429], [200])


def test_two_that_load_at_once_are_both_on_their_way(tmp_path):
    with serve_many(tmp_path, "abc", max_loaded=2) as served:
        for model in "ab":
            (served.at[model] / "slow").touch()
        assert [ask(served, model)[0] for model in "abcab"] == [202, 202, 409, 202, 202]
        for model in "ab":
            (served.at[model] / "slow").unlink()


def test_a_process_that_cannot_be_started(tmp_path, monkeypatch):
    def no_more(*_):
        raise RuntimeError("can't start new thread")

    with serve_many(tmp_path, "ab") as served:
        monkeypatch.setattr(model_init, "Engine", no_more)
        assert ask(served, "a")[0] == 503
        assert statuses(served)["a"] == "failed" and "new thread" in healthz(served)["last_error"]
        monkeypatch.undo()
        served.models.lives["a"].since -= 60
        served.models.lives["a"].promised.clear()
        loaded(served, "a")


def test_files_that_come_and_go_while_they_are_looked_at(tmp_path, monkeypatch):
    write_gguf(tmp_path / "stays.gguf")
    catalog = Catalog(tmp_path)
    files, folders = catalog.listing(str(tmp_path))
    monkeypatch.setattr(catalog, "listing", lambda path: ([*files, "gone.gguf"], folders))
    catalog.scan()
    assert list(catalog.models()) == ["stays"]

    def broken(path):
        raise OSError("the network folder hiccups")

    monkeypatch.setattr(catalog, "listing", broken)
    catalog.scan()
    assert list(catalog.models()) == ["stays"]


def test_a_pipe_is_no_model(tmp_path):
    os.mkfifo(tmp_path / "x.gguf")
    write_gguf(tmp_path / "y.gguf")
    assert listed(tmp_path) == ["y"]


def test_a_model_that_nothing_here_loads(tmp_path):
    write_files(tmp_path / "a-exl3", HF)
    (tmp_path / "a-exl3" / "config.json").write_text('{"quantization_config": {"quant_method": "exl3"}}')
    write_gguf(tmp_path / "b.gguf")
    limits = model_init.Limits(load_wait=60)
    (tmp_path / "scripted").mkdir()

    def make_spec(model):
        if model.kind == "exl3":
            choose_backend(model, "llamacpp")
        return EngineSpec("scripted:Scripted", str(tmp_path / "scripted"))

    with serve(model_init.Models(Catalog(tmp_path), make_spec, limits), ready=False) as served:
        for path, body in (
            ("/tokenize", {"content": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            status, reply, _ = served.request("POST", path, body | {"model": "a-exl3"})
            assert (status, reply["error"]["param"], reply["error"]["code"]) == (400, "model", "unsupported_model")
        assert served.chat("echo hi", max_tokens=9)[1]["model"] == "b"  # nor is it the default one
        assert served.request("GET", "/health")[0] == 200


def test_an_operator_names_a_model(tmp_path):
    with serve_many(tmp_path, "a", unknown="serve") as served:
        loaded(served, "a")
        assert served.request("POST", "/v1/models/unload", {"model": "typo"})[0] == 404
        assert served.request("POST", "/v1/models/unload", {})[0] == 400
        assert statuses(served) == {"a": "loaded"}


def test_switching_under_load(tmp_path):
    """Clients of two models, memory for one: nothing but 200, 202, 409 and 429, and both get on. SOAK_S sets how long."""
    end = time.monotonic() + float(os.environ.get("SOAK_S", 6))
    seen, waited = {"a": [], "b": []}, []

    def few():
        return min(told.count(200) for told in seen.values()) <= 16

    def client(served, model, number):
        key = from_client(ord(model) + number)
        while time.monotonic() < end or (few() and time.monotonic() < end + 60):
            begun = time.monotonic()
            while (status := ask(served, model, "echo some more text", headers=key)[0]) != 200 and time.monotonic() < end + 60:
                seen[model].append(status)
                time.sleep(0.1)
            seen[model].append(status)
            waited.append(time.monotonic() - begun)

    with serve_many(tmp_path, "ab", switch_deadline=0.5) as served:
        threads = in_background(*[lambda m=m, i=i: client(served, m, i) for m in "ab" for i in range(8)])
        for thread in threads:
            thread.join()
        assert {*seen["a"], *seen["b"]} <= {200, 202, 409, 429}, {*seen["a"], *seen["b"]}
        assert not few()
        print(json.dumps({m: {s: seen[m].count(s) for s in {*seen[m]}} for m in seen}), "longest wait", max(waited))
        until(lambda: served.models.queue_depth() == 0)


def test_two_thousand_clients_that_leave(tmp_path):
    """While loading, in the queue, before the first token, in mid-stream, and some with a reset: nothing is left of them."""
    chance = random.Random(5)
    with serve_many(tmp_path, "ab", slots=4, queue=16, load_wait=30) as served:
        loaded(served, "a")
        before_threads, before_files = threads_alive(), len(os.listdir("/proc/self/fd"))

        def visit(model, stream, patience, reset):
            with socket.create_connection((served.host, served.port)) as s:
                body = json.dumps(
                    {"model": model, "stream": stream, "messages": [{"role": "user", "content": "forever"}]}
                ).encode()
                s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                s.settimeout(patience)
                with contextlib.suppress(TimeoutError):
                    s.recv(400)
                    s.recv(400)
                if reset:
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        visits = [
            (
                "b" if i % 200 > 190 else "a",
                chance.random() < 0.7,
                chance.choice([0.001, 0.005, 0.02, 0.05]),
                chance.random() < 0.3,
            )
            for i in range(2000)
        ]

        def visitor():
            with contextlib.suppress(IndexError):
                while True:
                    visit(*visits.pop())

        for thread in in_background(*[visitor] * 24):
            thread.join()
        until(lambda: served.models.queue_depth() == 0 and served.models.running() == 0 and not served.models.switch)
        until(lambda: served.server.busy.count == 0)
        for model in "ab":
            engine = served.models.lives[model].engine
            if engine:
                assert served.request("POST", "/tokenize", {"model": model, "content": "x"}, {"Prefer": "wait=30"})[0] == 200
        lines = [line for model in "ab" for line in (served.at[model] / "log").read_text().splitlines()]
        started = sum(line.startswith("start") for line in lines)
        assert started > 20 and started == sum(line.startswith("cancel") for line in lines)  # every slot is free again
        until(  # processes that have ended keep a file number until they are collected
            lambda: gc.collect() >= 0 and threads_alive() <= before_threads and len(os.listdir("/proc/self/fd")) <= before_files
        )


# ── profiles ──

EVERYTHING = {
    "messages": [{"role": "user", "content": "echo the same"}], "model": "a", "stream": False, "max_tokens": 9, "temperature": 1,
    "top_p": 0.9, "top_k": 7, "min_p": 0.1, "n": 2, "seed": 3, "stop": ["zzz"], "presence_penalty": 0.1, "frequency_penalty": 0.2,
    "repetition_penalty": 1.1, "return_prompt": True,
}  # fmt: skip


def test_with_all_values_named_every_profile_is_the_same(tmp_path):
    replies = {}
    for name, profile in PROFILES.items():
        with serve_many(
            tmp_path / name, "a", profile=profile, unknown=profile.unknown_model, absent=profile.no_model
        ) as served:
            loaded(served, "a")
            status, reply, _ = served.request("POST", "/v1/chat/completions", EVERYTHING)
            assert status == 200 and reply["choices"][0]["message"]["content"] == "the same"
            reply["debug"].pop("fingerprint")
            replies[name] = {key: reply[key] for key in ("object", "model", "choices", "usage", "debug")}
    assert len(replies) == 6 and all(reply == replies["neutral"] for reply in replies.values())


@pytest.mark.parametrize(
    ("name", "stream", "max_tokens", "temperature", "top_p", "top_k"),
    [
        ("neutral", False, 1994, 0.7, 1, 0), ("exllamav3", True, 200, 0.8, 0.8, 50), ("osaurus", False, 1994, 0.7, 1, 0),
        ("openvino", False, 900, 0.7, 1, 0), ("llm-serve", False, 1024, 0.2, 0.95, 0), ("metallama", False, 256, 0.8, 0.95, 40),
    ],
)  # fmt: skip
def test_what_a_request_gets_that_names_nothing(name, stream, max_tokens, temperature, top_p, top_k, tmp_path):
    with serve_many(tmp_path, "a", profile=PROFILES[name]) as served:
        loaded(served, "a")
        body = {"messages": [{"role": "user", "content": "echo x"}], "return_prompt": True}
        status, reply, headers = served.request("POST", "/v1/chat/completions", body)
        assert status == 200 and (headers["Content-Type"] == "text/event-stream") == stream
        debug = (sse(reply)[-1] if stream else reply)["debug"]
        used = debug["prompts"][0]["sampling"]
        # Osaurus' 2,048 are cut down to what the context has left
        assert [used[key] for key in ("max_tokens", "temperature", "top_p", "top_k")] == [max_tokens, temperature, top_p, top_k]
        assert served.chat("echo x", max_tokens=1999, stream=False)[0] == 400  # one that is asked for is not cut down


def test_every_default_is_a_flag():
    flags = [
        "--default-stream", "true", "--default-max-tokens", "5", "--max-tokens-limit", "6", "--default-temperature", "0.1",
        "--default-top-p", "0.2", "--default-top-k", "3", "--no-model", "refuse", "--unknown-model", "400",
        "--roles", "user,tool", "--load-wait", "4", "--host", "h", "--port", "1",
    ]  # fmt: skip
    for name in PROFILES:
        profile = model_init.profile_of(endpoint.parse_args(["--profile", name, *flags]))
        assert profile == model_init.Profile(
            1, "h", True, 5, 6, 0.1, 0.2, 3, "refuse", "400", ("user", "tool"), 4.0, PROFILES[name].owned_by
        )
        assert model_init.profile_of(endpoint.parse_args(["--profile", name])) == PROFILES[name]


def test_flags_of_exllamav3_are_accepted():
    line = "-m x -gs 10,20 -cs 4096 -cq 4,4 -tp -tpb nccl -nw -lm -swa_full -chunk_size 512 --draft_model_dir y --length 2048"
    args = endpoint.parse_args([*line.split(), "--batch_size", "3", "--tp-max-parallelism-mlp", "2", "-tp_attn", "1"])
    assert (args.model_dir, args.cache_size, args.length, args.max_parallel) == ("x", 4096, 2048, 3)
    assert args.exllamav3 == [
        "-gs",
        "10,20",
        "-cq",
        "4,4",
        "-tp",
        "-tpb",
        "nccl",
        "-nw",
        "-lm",
        "-swa_full",
        "-chunk_size",
        "512",
        "--tp_max_parallelism_mlp",
        "2",
        "-tp_attn",
        "1",
    ]
    assert args.draft_model_dir == "y"


def test_llm_serves_error_codes(tmp_path):
    """Those of its document's section 8 that a scripted engine can bring about: 400, 409, 429, 503, 504, 500."""
    with serve_many(tmp_path, "abc", slots=1, queue=1, profile=PROFILES["llm-serve"], unknown="400", default="a") as served:
        loaded(served, "a")
        assert ask(served, "x")[0] == 400
        assert ask(served, "a", "x" * 3000)[0] == 400
        assert ask(served, "a", "raise")[0] == 500
        loaded(served, "a")
        served.server.request_timeout = 0.3
        assert served.chat("forever")[0] == 504
        served.server.request_timeout = 60
        (served.at["a"] / "hold").touch()
        busy = in_background(*[lambda i=i: ask(served, "a", headers=from_client(1)) for i in range(2)])
        until(lambda: served.models.running() == 2)
        assert ask(served, "a", headers=from_client(1))[0] == 429
        (served.at["b"] / "fail").touch()
        assert [ask(served, "b")[0], ask(served, "c")[0]] == [202, 409]
        (served.at["a"] / "hold").unlink()
        for thread in busy:
            thread.join()
        until(lambda: statuses(served)["b"] == "failed")
        assert ask(served, "b")[0] == 503
        assert healthz(served)["status"] == "degraded"


def test_aliases(tmp_path):
    for name in ("a", "b"):
        write_gguf(tmp_path / name / "model.Q4_0.gguf")
    catalog = Catalog(tmp_path, aliases=[("a", "small"), ("a", "tiny"), ("b", "Large")])
    shown = {model.id: catalog.public(model) for model in catalog.models().values()}
    assert shown == {"a": "small", "b": "Large"}
    assert [catalog.find(name).id for name in ("small", "tiny", "a", "large", "b")] == ["a", "a", "a", "b", "b"]
    assert catalog.find("other") is None
    alone = Catalog(fixed=[Model("x", tmp_path, "gguf", 1)], aliases=[("", "shown"), ("", "more")])
    assert (alone.public(alone.find("more")), alone.find("shown").id) == ("shown", "x")


def test_the_alias_stands_in_listing_and_replies(tmp_path):
    model = Model("scripted", tmp_path, "gguf", 1)
    limits = model_init.Limits(max_jobs=4, patience=60, default=model.id)
    lives = model_init.Models(
        Catalog(fixed=[model], aliases=[("", "ours")]), lambda _: EngineSpec("scripted:Scripted", str(tmp_path), 2), limits
    )
    with serve(lives) as served:
        assert [card["id"] for card in served.request("GET", "/v1/models")[1]["data"]] == ["ours"]
        assert served.chat("echo x")[1]["model"] == "ours"
        assert served.chat("echo x", model="scripted")[1]["model"] == "scripted"
