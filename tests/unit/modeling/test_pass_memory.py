"""What a pass takes, counted from the tensors that its operations make."""

import torch

from sftcli.modeling.pass_memory import measure_pass


def test_weights_in_a_layout_of_the_processor_are_no_part_of_what_a_pass_makes():
    weight = torch.randn(8, 8).to_mkldnn()

    def take(tokens: int) -> torch.Tensor:
        made = torch.ones(tokens, 16)
        return made @ torch.ones(16, 8) + weight.to_dense().sum()

    found = measure_pass(take, 64)
    assert round(found.token) == 4 * (16 + 2 * 8)
