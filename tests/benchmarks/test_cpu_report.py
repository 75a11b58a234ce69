"""What is claimed of the CPU comparison's numbers, and how they are shown."""

from pathlib import Path

import pytest
from cpu_cells import OURS, Cell, Entrant
from cpu_model import Model
from cpu_report import Findings, markdown
from weights_model import Files, Size

ONE = Cell("decode", 1)
MILLRACE, LLAMA = Entrant(OURS, "int8"), Entrant("llama.cpp", "int8")
SIZE = Size(embed_dim=64, mlp_dim=128, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=100)


class Limits:
    """A machine that reads 1,000 bytes a second."""

    by = "nobody"

    def measure(self):
        return {"read_bytes_per_s": 1000, "int8_per_s": 1, "bf16_per_s": 1, "int8_by": "", "bf16_by": ""}


@pytest.fixture
def findings():
    model = Model(name="small", size=SIZE, files=Files(Path("nowhere")), prefill_lens=(128,))
    found = Findings(model, Limits(), prompt_len=0)
    found.note_limits()
    for seconds in (0.5, 9.0, 0.4):
        found.note(MILLRACE, ONE, {"seconds": seconds, "setting": ""})
    found.note(LLAMA, ONE, {"seconds": 1.0, "setting": "flash attention"})
    return found


def test_a_speed_is_the_median_of_its_rounds(findings):
    assert findings.speeds == {(MILLRACE, ONE): 2.0, (LLAMA, ONE): 1.0}
    (row,) = [row for row in findings.rows() if row["measure"] == "decode" and row["of"] == OURS]
    assert (row["tokens_per_s"], row["lowest"], row["highest"], row["runs"]) == (2.0, 1 / 9.0, 2.5, 3)


def test_the_resident_set_may_be_weights_and_cache_and_some(findings):
    sizes = {"weights": 10**9, "kv_cache": 10**9, "resident": 29 * 10**8}
    findings.sizes[MILLRACE] = sizes
    (holds,) = [holds for claim, holds in findings.claims().items() if "resident set" in claim]
    assert holds
    findings.sizes[MILLRACE] = sizes | {"resident": 291 * 10**7}
    (holds,) = [holds for claim, holds in findings.claims().items() if "resident set" in claim]
    assert not holds


def test_a_step_of_one_sequence_reads_all_weights_but_the_embeddings_rows(findings):
    table = 2 * SIZE.vocab_size * SIZE.embed_dim
    findings.sizes[MILLRACE] = {"weights": 400 + table, "kv_cache": 1, "resident": 1}
    (claim,) = [claim for claim in findings.claims() if "bandwidth" in claim]
    assert claim.endswith("(80%)")  # 400 bytes, twice a second


def test_the_first_token_is_claimed_where_llama_cpp_was_there(findings):
    findings.starts = {"Millrace int8": 1.4}
    assert not any("first token" in claim for claim in findings.claims())
    findings.starts["llama.cpp int8"] = 1.0
    assert findings.claims()["time to the first token at most 1.5 x llama.cpp's (1.40 s beside 1.00 s)"]


def test_a_start_of_ours_that_failed_keeps_no_promise(findings):
    findings.starts = {"llama.cpp int8": 1.0}
    assert findings.claims()["time to the first token at most 1.5 x llama.cpp's (inf s beside 1.00 s)"] is False


def test_a_machine_that_was_not_quiet_is_named(findings):
    findings.note_shares(idle=0.0, others=0.3)
    assert findings.warnings() == ["other programs took 30% of the processor time: not a quiet machine"]
    assert findings.claims()["other programs left the machine alone (30% of the processor time)"] is False


def test_the_readmes_table_has_speed_ratio_and_peer(findings):
    assert "| decode batch 1 | - | 2.0, 2.00 x llama.cpp int8 | - |" in markdown(findings).splitlines()
