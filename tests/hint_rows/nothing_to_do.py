"""Hints that no row follows: the code, words of the hint, and why."""

from __future__ import annotations

# There is nothing in them that could be done.
NOTHING_TO_DO: list[tuple[str, str, str]] = [
    ("unsafe-index", "do not use this checkpoint", "a warning of somebody hostile"),
    ("hostile-pickle", "do not open it with torch.load either", "a warning of somebody hostile"),
    ("internal-error", "SHARDMERGE_TRACEBACK=1", "a bug of ours is to be reported"),
    ("not-lora", "no merge can do it", "the adapter is used with peft, and nothing is converted"),
    ("adapter-setting", "no merge can do it", "the adapter is used with peft, and nothing is converted"),
    ("adapter-without-base", "load the adapter together with its base", "the adapter is used with peft"),
    ("unknown-preset", "known here", "all are listed where they are 20 at most, and there are more"),
    ("unknown-op", "known here", "all are listed where they are 20 at most, and there are more"),
]

# Tests that follow them with means that a row has not: the file and the name.
ELSEWHERE: list[tuple[str, str, str]] = [
    (
        "missing-file",
        "whoever writes there is done, then run again",
        "test_pins.py::test_a_file_that_goes_before_it_is_read_is_a_refused_source",
    ),
    ("unreadable-mapping", "write the mapping to a file", "test_spec.py::test_a_pipe_is_no_mapping_until_it_is_a_file"),
    (
        "unreadable-mapping",
        "convert a checkpoint without",
        "test_spec.py::test_a_checkpoint_or_a_directory_is_no_mapping",
    ),
    ("unreadable-mapping", r"^\{\}$", "test_every_error.py::test_a_sample_of_all_errors_at_all_calls"),
    ("unknown-code", "did you mean", "test_error_codes.py::test_an_unknown_code_names_its_neighbour"),
    ("unknown-code", "lists all codes", "test_error_codes.py::test_an_unknown_code_names_its_neighbour"),
    ("unknown-tensor", "leave it out", "test_inspect.py::test_a_template_that_matches_nothing"),
    ("unknown-tensor", "matches those below it", "test_inspect.py::test_a_template_that_matches_nothing"),
    (
        "reference-differs",
        "the worst first",
        "test_comparing.py::test_verify_has_the_same_measure_and_its_hint_lists_all",
    ),
    ("no-effect", "leave out either `headers`", "test_comparing.py::test_what_cannot_be_asked"),
    ("cannot-check", "leave --check out", "test_load_check.py::test_a_class_that_cannot_be_loaded_without_values"),
    ("no-transformers", "install it beside", "test_load_check.py::test_each_package_that_is_not_there_is_named"),
    ("no-huggingface-hub", "pip install", "test_hub.py::test_a_snapshot_without_its_weights_is_completed"),
    (
        "",
        "to go on: shardmerge",
        "test_publish.py::test_a_run_that_is_stopped_publishes_nothing_and_is_gone_on_with",
    ),
    ("worker-died", "goes on where it was", "test_publish.py::test_a_process_that_the_system_ends_is_made_up_for"),
    ("output-changed", "with --recheck", "test_digests.py::test_a_part_that_changed_gets_no_digest"),
    (
        "output-exists",
        "write the statement to another file",
        "test_signing.py::test_a_statement_replaces_a_statement_alone",
    ),
    ("staging-gone", "starts again", "test_races.py::test_clean_and_a_run"),
    ("output-exists", "then publishes what is made", "test_races.py::test_clean_and_a_run"),
    ("packed-item", "pip install", "test_packed_items.py::test_without_the_library_it_says_what_to_install"),
    ("truncated-file", "or one is damaged", "test_packed_items.py::test_what_only_unpacking_shows_stops_the_run"),
    ("no-ray", "pip install", "test_executors.py::test_all_parts_get_receipts"),
    ("no-cluster", "or leave --address out", "test_executors.py::test_all_parts_get_receipts"),
    # By the number of the error: see `system_errors`.
    ("system-error", r"^\{\}$", "test_every_error.py::test_the_name_of_an_output_directory_has_a_longest"),
    ("unreadable-file", r"^\{\}$", "test_every_error.py::test_a_sample_of_all_errors_at_all_calls"),
    ("unwritable-output", r"^\{\}$", "test_every_error.py::test_a_sample_of_all_errors_at_all_calls"),
    ("no-memory", "give less --max-memory", "test_real_limits.py::test_a_limit_ends_a_run_and_the_next_one_goes_on"),
    ("not-started", "give --workers 1", "test_real_limits.py::test_a_limit_ends_a_run_and_the_next_one_goes_on"),
    ("unwritable-output", "the disk loses", "test_io_errors.py::test_each_call_that_fails_ends_the_run"),
    (
        "bench-failed",
        "run `shardmerge convert`",
        "test_publish.py::test_a_run_that_is_stopped_publishes_nothing_and_is_gone_on_with",
    ),
    (
        "",
        "--sources MAPPING makes every",
        "test_cloning.py::test_verify_says_what_it_did_not_check_and_sources_find_it",
    ),
    ("adapter-setting", "leave `weight:` out", "test_adapter_maths.py::test_what_is_there_or_not_has_no_weight"),
    (
        "adapter-setting",
        "merge it first, into the original base",
        "test_adapter_maths.py::test_a_start_is_that_of_an_untouched_base",
    ),
    (
        "adapter-setting",
        "the model that the adapter was trained on",
        "test_adapter_maths.py::test_replication_beyond_the_base_is_refused",
    ),
    ("adapters-clash", "merge it alone and first", "test_adapter_maths.py::test_replication_comes_first"),
    (
        "unknown-layer",
        "let the peft that wrote it",
        "test_adapter_maths.py::test_square_experts_of_an_older_peft_are_not_guessed",
    ),
    ("not-lora", "fuse it with mlx-lm itself", "test_adapter_tools.py::test_mlx_beyond_lora_is_refused_by_its_name"),
    (
        "unknown-adapter-tensor",
        "merge it with .* itself",
        "test_adapter_tools.py::test_parts_that_are_not_merged_are_named_with_their_tool",
    ),
    (
        "adapter-without-base",
        "the part of the pipeline",
        "test_adapter_tools.py::test_flattened_names_of_another_base_are_said",
    ),
    (
        "adapter-without-base",
        "name as .* the model that the adapter was trained on",
        "test_adapter_maths.py::test_parameters_that_no_base_has_are_refused",
    ),
    ("not-one-model", "the model that the training began with", "test_lora_extract.py::test_another_model_is_no_base"),
    ("not-one-model", "if the training did not change them", "test_lora_extract.py::test_stacks_are_not_extracted"),
    ("op-shape", "the model that the training began with", "test_lora_extract.py::test_another_model_is_no_base"),
    ("op-shape", "or a smaller number", "test_lora_extract.py::test_a_rank_that_a_weight_does_not_have"),
    (
        "adapter-setting",
        "write `combination_type: cat`; or merge each",
        "test_adapter_maths.py::test_a_combination_that_is_no_merge_is_refused_with_the_reason",
    ),
    (
        "adapter-rank",
        "write `combination_type: cat`, which needs",
        "test_adapter_maths.py::test_linear_is_of_pairs_alone",
    ),
]

# They ask for a tool that cannot be had in a test.
OUT_OF_REACH: list[tuple[str, str, str]] = [
    ("torch-tar", "with a torch of today", "no torch that can be installed writes such files"),
    ("kind-not-yet", "Megatron's tools/checkpoint/convert.py", "Megatron is no package, and takes GPUs"),
    ("kind-not-yet", "engine.save_16bit_model", "a training run of the user's own, which a test has not"),
    ("kind-not-yet", "Megatron's training command", "Megatron is no package, and takes GPUs"),
]
