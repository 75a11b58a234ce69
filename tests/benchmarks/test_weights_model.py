"""The same weights under other names and in another order."""

import numpy as np
from weights_model import gguf_name, interleave_rotated


def test_what_rope_turns_together_comes_side_by_side_within_each_head():
    weight = np.arange(8)[:, None]  # two heads of four rows; rope turns rows 0 and 2, 1 and 3
    assert interleave_rotated(weight, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_tensors_have_llama_cpps_names():
    assert gguf_name("model.layers.3.self_attn.o_proj.weight") == "blk.3.attn_output.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
