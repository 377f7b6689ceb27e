"""Mistakes in options of checkpoints; see ``bad_input``."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"
_SAVE = f"{GOOD} --save x --save-interval 4"

CHECKPOINT_CASES: dict[str, tuple[int, str, list[str]]] = {
    "a checkpoint's model that is not said": (
        1,
        "--mock-data --load somewhere",
        [
            "--num-layers is missing; every model needs it (--use-checkpoint-args takes it",
            "--hidden-size is missing; every model needs it (--use-checkpoint-args takes it",
            "--load somewhere is no folder",
        ],
    ),
    "retained without a folder": (
        1,
        f"{GOOD} --save-retain-interval 4",
        ["--save-retain-interval 4 has no effect without --save"],
    ),
    "retained and never saved": (
        1,
        f"{_SAVE} --save-retain-interval 10",
        ["--save-retain-interval 10 must be a multiple of --save-interval 4"],
    ),
    "retained at the end alone": (
        1,
        f"{GOOD} --save x --save-retain-interval 10",
        ["--save-retain-interval 10 needs --save-interval"],
    ),
    "retained every 0": (
        1,
        f"{_SAVE} --save-retain-interval 0",
        ["--save-retain-interval 0 must be at least 1"],
    ),
    "options of no checkpoint": (
        1,
        f"{GOOD} --use-checkpoint-args",
        ["--use-checkpoint-args needs --load or --pretrained-checkpoint"],
    ),
    "options of an empty folder": (
        1,
        "--mock-data --use-checkpoint-args --load /no/such/folder",
        ["--load /no/such/folder has no checkpoint to take options from", "--allow-fresh-start"],
    ),
    "sizes of no checkpoint": (
        1,
        f"{GOOD} --use-mp-args-from-checkpoint-args",
        ["--use-mp-args-from-checkpoint-args has no effect without --use-checkpoint-args"],
    ),
    "no tokenizer of no checkpoint": (
        1,
        f"{GOOD} --no-use-tokenizer-model-from-checkpoint-args",
        ["--no-use-tokenizer-model-from-checkpoint-args has no effect without"],
    ),
    "two schedules": (
        1,
        f"{GOOD} --load x --allow-fresh-start --override-opt_param-scheduler "
        "--use-checkpoint-opt_param-scheduler",
        ["--override-opt_param-scheduler takes the schedule of the command line", "one of them"],
    ),
    "schedule of no checkpoint": (
        1,
        f"{GOOD} --use-checkpoint-opt_param-scheduler",
        ["--use-checkpoint-opt_param-scheduler has no effect without --load"],
    ),
    "schedule of another run": (
        1,
        f"{GOOD} --load x --allow-fresh-start --finetune --use-checkpoint-opt-param-scheduler",
        ["--use-checkpoint-opt_param-scheduler has no effect with --finetune"],
    ),
    "nothing pretrained": (
        1,
        f"{GOOD} --pretrained-checkpoint /no/such/folder",
        ["--pretrained-checkpoint /no/such/folder has no checkpoint"],
    ),
    "a pretrained checkpoint that is not there": (
        1,
        f"{GOOD} --pretrained-checkpoint /no/such/iter_0000010",
        ["/no/such has no complete checkpoint of iteration 10; complete here: none"],
    ),
    "a new start each time": (
        1,
        f"{GOOD} --load /no/such/own --pretrained-checkpoint /no/such/folder --finetune",
        ["--finetune exclude each other", "has no checkpoint"],
    ),
    "a step of two folders": (
        1,
        f"{GOOD} --load . --ckpt-step 3 --pretrained-checkpoint /no/such/folder",
        ["--ckpt-step 3 has no effect with --pretrained-checkpoint", "complete checkpoint of"],
    ),
    "fresh or pretrained": (
        1,
        f"{GOOD} --load /no/own --pretrained-checkpoint /no/folder --allow-fresh-start",
        ["--allow-fresh-start has no effect with --pretrained-checkpoint", "has no checkpoint"],
    ),
    "between without a place": (
        1,
        f"{GOOD} --save x --non-persistent-save-interval 2",
        ["--non-persistent-save-interval 2 needs --non-persistent-ckpt-type"],
    ),
    "between without a folder": (
        1,
        f"{GOOD} --non-persistent-save-interval 2 --non-persistent-ckpt-type global",
        ["--non-persistent-save-interval 2 has no effect without --save"],
    ),
    "between every 0": (
        1,
        f"{_SAVE} --non-persistent-save-interval 0 --non-persistent-ckpt-type global",
        ["--non-persistent-save-interval 0 must be at least 1"],
    ),
    "between and persistent at once": (
        1,
        f"{_SAVE} --non-persistent-save-interval 8 --non-persistent-ckpt-type global",
        ["--non-persistent-save-interval 8 has no effect with --save-interval 4"],
    ),
    "a place and nothing between": (
        1,
        f"{_SAVE} --non-persistent-ckpt-type in_memory",
        ["no effect without --non-persistent-save-interval or --load"],
    ),
    "an unknown place": (
        1,
        f"{_SAVE} --non-persistent-save-interval 2 --non-persistent-ckpt-type in-memory",
        ["--non-persistent-ckpt-type in-memory: must be one of", "did you mean in_memory?"],
    ),
    "local without a disk": (
        1,
        f"{_SAVE} --non-persistent-save-interval 2 --non-persistent-ckpt-type local",
        ["--non-persistent-ckpt-type local needs --non-persistent-local-ckpt-dir"],
    ),
    "folders of other kinds": (
        1,
        f"{_SAVE} --non-persistent-save-interval 2 --non-persistent-ckpt-type in_memory "
        "--non-persistent-local-ckpt-dir x --non-persistent-global-ckpt-dir y",
        [
            "--non-persistent-local-ckpt-dir x has no effect without",
            "--non-persistent-global-ckpt-dir y has no effect without",
        ],
    ),
    "a folder that is a file": (
        1,
        f"{_SAVE} --non-persistent-save-interval 2 --non-persistent-ckpt-type global "
        "--non-persistent-global-ckpt-dir /dev/null",
        ["--non-persistent-global-ckpt-dir /dev/null is a file"],
    ),
}
