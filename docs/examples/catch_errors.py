"""Reports what is wrong with a checkpoint in one line each: python catch_errors.py CHECKPOINT."""

import sys

import shardmerge

try:
    catalog = shardmerge.inspect(sys.argv[1])
except shardmerge.ShardmergeError as error:
    for single in error.each():  # all problems of a stage come together
        print(single.code, "|", single.what, "|", single.hint)
    sys.exit(error.exit_code)
print("readable:", catalog.kind)
