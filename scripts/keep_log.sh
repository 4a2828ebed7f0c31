#!/bin/sh
# keep_log.sh COMPILER...: runs it and keeps what it says beside its output, in FILE.o.log, where scripts/check_kernels.py
# looks for warnings. (ccache repeats the warnings of what it has.)
previous= output=
for argument; do
  [ "$previous" = -o ] && output=$argument
  previous=$argument
done
"$@" >"$output.log" 2>&1
status=$?
cat "$output.log" >&2
exit $status
