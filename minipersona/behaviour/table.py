"""The behaviour suite's result for reading."""

from __future__ import annotations

from collections.abc import Mapping

from minipersona.behaviour.suite import Behaviour


def behaviour_table(results: Mapping[str, Behaviour]) -> str:
    """The rates of each prompt set; `results` are behaviour.json by the model's name in the table."""
    width = max(9, *(len(name) for result in results.values() for name in result.sets)) + 1
    who = max(map(len, results)) + 1
    lines = [
        f"{'':<{who}}{'set':<{width}}{'answers':>8}{'scored':>8}{'coherent':>9}{'misaligned':>11}"
        f"{'of scored':>11}{'of coherent':>13}  95% interval"
    ]
    lines.append("-" * len(lines[0]))
    for name, result in results.items():
        for chosen, row in result.sets.items():
            low, high = row.rate_coherent_ci95
            lines.append(
                f"{name:<{who}}{chosen:<{width}}{row.answers:>8,}{row.scored:>8,}{row.coherent:>9,}"
                f"{row.misaligned:>11,}{_percent(row.rate):>11}{_percent(row.rate_coherent):>13}"
                f"  {low:.1%} to {high:.1%}"
            )
    judges = {str(result.judge["kind"]): result.judge.get("model") or "" for result in results.values()}
    lines.append("judge: " + ", ".join(f"{kind} {model}".rstrip() for kind, model in judges.items()))
    return "\n".join(lines)


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"
