"""The benchmark of generation, on tiny sizes."""

import re

from panorama_vlm.benchmarks.generate import main


def test_it_compares_the_same_tokens_and_says_where_the_time_goes(capsys):
    main(["--smoke", "--batch", "1", "2", "--answer", "3", "6", "--threads", "1"])
    printed = capsys.readouterr().out
    assert printed.endswith("Ours and the sum of its parts gave the same tokens.\n")
    rows = [line.split(" | ") for line in printed.splitlines() if re.match(r"\| \d", line)]
    assert [row[:2] for row in rows[::3]] == [["| 1", "3"], ["| 1", "6"], ["| 2", "3"], ["| 2", "6"]]
    assert [row[3] for row in rows[:3]] == ["80", "80", "152"]  # 8 * 8 owned and 16 global; 9 * 16 and 8 newlines
    first, others = re.findall(r"(?:first token|the others) ([0-9.]+) s: (.*)", printed)[:2]
    for _, shares in (first, others):
        assert abs(sum(map(float, re.findall(r"\(([0-9.-]+) %", shares))) - 100) < 0.5
