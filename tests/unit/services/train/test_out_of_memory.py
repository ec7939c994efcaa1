import pytest
import torch

from sftcli.errors import ResourceError
from sftcli.services.train.run import memory_errors


def tried():
    return "micro-batches of 4 rows"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError()])
def test_out_of_memory_names_what_was_tried_and_the_cheapest_way_out_first(error):
    with (
        pytest.raises(ResourceError, match="micro-batches of 4 rows") as caught,
        memory_errors(tried, resume_command="sft resume x"),
    ):
        raise error
    assert caught.value.exit_code == 71
    assert caught.value.hint.index("micro_batch_size") < caught.value.hint.index("max_tokens")


def test_run_that_could_not_take_less_by_itself_is_told_how_to_go_on_with_less():
    with (
        pytest.raises(ResourceError) as caught,
        memory_errors(tried, resume_command="sft resume x", way_down=lambda: "training.micro_batch_size=2"),
    ):
        raise MemoryError
    told = "sft resume x --set training.micro_batch_size=2 --allow-change training.micro_batch_size"
    assert told in caught.value.hint


def test_real_failure_to_allocate_on_the_cpu_is_one():
    with pytest.raises(ResourceError), memory_errors(tried, resume_command="sft resume x"):
        torch.empty(2**58, dtype=torch.uint8)


def test_other_faults_pass():
    with pytest.raises(RuntimeError, match="shape"), memory_errors(tried, resume_command="sft resume x"):
        raise RuntimeError("shape")
