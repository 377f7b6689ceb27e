from megatron.core.distributed.bucket_layout import BufferKey
from megatron.core.optimizer.param_groups import ParamGroup, plan_param_groups


def test_buffers_that_decay_are_grouped_apart_from_those_that_do_not():
    keys = [
        BufferKey(False, True, "torch.float32"),
        BufferKey(True, False, "torch.float32"),
        BufferKey(True, True, "torch.float32"),
    ]
    assert plan_param_groups(keys) == (
        ParamGroup(buffers=(0, 2), wd_mult=1.0),
        ParamGroup(buffers=(1,), wd_mult=0.0),
    )


def test_there_is_no_empty_group():
    assert plan_param_groups([BufferKey(False, False, "torch.float32")]) == (
        ParamGroup(buffers=(0,), wd_mult=0.0),
    )
