# bench-start.jq: the results of scripts/bench-start, lines of "way mbit:ms milliseconds requests bytes", as medians for each way over each
# link, in the order of the lines. $run has what else is said of the run.
def median: sort | (.[(length - 1) / 2 | floor] + .[length / 2 | floor]) / 2;
[inputs | split(" ") | { key: .[:2], numbers: .[2:] | map(tonumber) }] as $starts
| $run + {
    results: (reduce $starts[].key as $key ([]; if index([$key]) then . else . + [$key] end) | map(
      . as [$way, $link]
      | [$starts[] | select(.key == [$way, $link]) | .numbers] as $rounds
      | ($link | split(":") | map(tonumber)) as [$mbit, $rtt_ms]
      | {
          way: $way, mbit: $mbit, rtt_ms: $rtt_ms, rounds: ($rounds | length),
          seconds: ($rounds | map(.[0]) | median / 1000),
          requests: ($rounds | map(.[1]) | median | floor),
          bytes: ($rounds | map(.[2]) | median | floor)
        }
    ))
  }
