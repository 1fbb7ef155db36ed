"""Real schemas with valid and invalid instances, held against this server's grammars and its check.

    pip install llguidance==1.9.1 xgrammar==0.2.8
    python examples/schema_bench.py DATA [--engine llguidance|xgrammar] [--native] [--every N] [--show WORD]

DATA is maskbench/data of github.com/guidance-ai/jsonschemabench (a folder of JSON files), or a .jsonl.gz made of it. A schema passes
when its grammar can be made and takes every valid instance (compact JSON, in the order of its file) and no invalid one. `llguidance`
runs the grammar that llamacpp, transformers and exllamav3 follow, `xgrammar` the one that OpenVINO does. With --native the library's
own JSON Schema compiler is measured in this server's place.
"""

import argparse
import collections
import gzip
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import constraints

Takes = Callable[[str], bool]


def cases(data: str) -> Iterator[Any]:
    if data.endswith(".gz"):
        with gzip.open(data, "rt") as lines:
            yield from map(json.loads, lines)
    else:
        for file in sorted(pathlib.Path(data).glob("*.json")):
            yield {"name": file.name, **json.loads(file.read_text())}


def with_llguidance(native: bool) -> Callable[[Any], Takes]:
    import llguidance

    tokens = llguidance.LLTokenizer("byte")

    def made(given: Any) -> Takes:
        compact = {"whitespace_flexible": False}
        compiled = llguidance.LLMatcher.grammar_from_json_schema
        grammar = compiled(given, overrides=compact) if native else constraints.lark_grammar(given)
        problem = llguidance.LLMatcher.validate_grammar(grammar, tokens)
        if problem and not problem.startswith("WARNING"):
            raise constraints.Unsupported(problem.split("\n")[0])

        def takes(instance: str) -> bool:
            matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
            return bool(matcher.consume_tokens(list(instance.encode())) and matcher.is_accepting())

        return takes

    return made


def with_xgrammar(native: bool) -> Callable[[Any], Takes]:
    import xgrammar

    vocabulary = [bytes([i]) for i in range(256)] + [b"</s>"]
    info = xgrammar.TokenizerInfo(vocabulary, xgrammar.VocabType.RAW, vocab_size=257, stop_token_ids=[256])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def made(given: Any) -> Takes:
        if native:
            try:
                compact = {"any_whitespace": False, "separators": (",", ":"), "strict_mode": False, "any_order": True}
                grammar = compiler.compile_json_schema(json.dumps(given), **compact)
            except RuntimeError as error:
                raise constraints.Unsupported(str(error).split("\n")[-1]) from None
        else:
            grammar = compiler.compile_grammar(xgrammar.Grammar.from_ebnf(constraints.ebnf_grammar(given)))

        def takes(instance: str) -> bool:
            matcher = xgrammar.GrammarMatcher(grammar)
            return all(matcher.accept_token(byte) for byte in instance.encode()) and matcher.accept_token(256)

        return takes

    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--engine", choices=["llguidance", "xgrammar"], default="llguidance")
    parser.add_argument("--native", action="store_true", help="the library's own compiler of schemas")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--show", help="name the schemas whose refusal holds this word, and every fault")
    given = parser.parse_args()
    made = {"llguidance": with_llguidance, "xgrammar": with_xgrammar}[given.engine](given.native)
    total: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    times: dict[str, list[float]] = {"grammar": [], "engine": []}

    def fault(name: str, what: str) -> bool:
        total[what] += 1
        if given.show is not None:
            print(name, what)
        return False

    for number, case in enumerate(cases(given.data)):
        if number % given.every:
            continue
        total["schemas"] += 1
        started = time.perf_counter()
        try:
            text = case["schema"] if given.native else constraints.schema_grammar(case["schema"])
            times["grammar"].append(time.perf_counter() - started)
            takes = made(text)
            times["engine"].append(time.perf_counter() - started - times["grammar"][-1])
        except constraints.Unsupported as error:
            total["refused"] += 1
            reasons[str(error).split(" at ")[0][:70]] += 1
            if given.show and given.show in str(error):
                print(case["name"], error)
            continue
        except Exception as error:
            fault(case["name"], f"broken: {error!r:.100}")
            continue
        good = True
        for test in case.get("tests", ()):
            instance = json.dumps(test["data"], ensure_ascii=False, separators=(",", ":"))
            total["valid" if test["valid"] else "invalid"] += 1
            if takes(instance) != test["valid"]:
                good = fault(case["name"], "valid refused" if test["valid"] else "INVALID TAKEN")
            if (constraints.violation(case["schema"], test["data"]) is None) != test["valid"]:
                fault(case["name"], f"the check calls {'a valid' if test['valid'] else 'an invalid'} one the other")
        total["passing"] += good
    for reason, count in reasons.most_common(20):
        print(count, reason)
    for what, taken in times.items():
        taken.sort()
        print(
            f"{what} ms p50/p90/p99/worst:",
            *[f"{taken[min(len(taken) - 1, int(len(taken) * q))] * 1000:.1f}" for q in (0.5, 0.9, 0.99, 1)],
        )
    print(dict(total))
    print(f"{total['passing']} of {total['schemas']} pass, {total['INVALID TAKEN']} invalid instances taken")


if __name__ == "__main__":
    main()
