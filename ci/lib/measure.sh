# shellcheck shell=bash
# What the rounds of ci/bench and benches/peers measure with: samples, and the yardsticks that have two ends. Sourced.
#
# Before: `programs` (the directory ci/bench fills), `seconds` (time for each figure), `dir` (gets samples.tsv and scraps);
# for perftest `device`. A line of samples.tsv, one for each sample, in the order of the rounds:
#
#   series <tab> unit <tab> value          unit: MiB/s, IOPS, or us (microseconds for each)
#
# shellcheck disable=SC2154 # programs, seconds, dir and device are the caller's

load() { cut -d' ' -f1-3 /proc/loadavg; }
sample() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" | tee -a "$dir/samples.tsv"; }

# ours PROGRAM GROUP: runs what criterion has under that name (a regular expression). Transfers become MiB/s.
ours() {
	"$programs/deps/$1" --bench --output-format bencher --noplot --sample-size 10 \
		--warm-up-time 0.3 --measurement-time "$seconds" "$2" 2>"$dir/log" >"$dir/out" || { cat "$dir/log" >&2; exit 1; }
	awk -F' [.][.][.] bench: *' -v OFS='\t' '/^test / {
		name = substr($1, 6); split($2, n, " "); gsub(",", "", n[1])
		if (n[1] == 0) next
		if (name ~ /1 MiB/) print name, "MiB/s", 1e9 / n[1]
		else print name, "us", n[1] / 1000
	}' "$dir/out" | tee -a "$dir/samples.tsv"
}

# Two ends of a yardstick: SERVER runs in the background, CLIENT's output is what counts. The client is tried again
# until the server listens.
yardstick() { # server-command client-command
	local server try
	bash -c "exec $1" >/dev/null 2>&1 &
	server=$!
	for try in 1 2 3 4 5 6 7 8 9 10; do
		sleep 0.2
		if bash -c "exec $2" >"$dir/out" 2>"$dir/log"; then
			wait "$server" || true
			return 0
		fi
	done
	kill "$server" 2>/dev/null || true
	echo "failed after $try tries: $2" >&2
	cat "$dir/out" "$dir/log" >&2
	return 1
}

iperf() { # label -l-argument
	yardstick "iperf3 -s -1 -p 5299" "iperf3 -c 127.0.0.1 -p 5299 -t $seconds -l $2 -f m"
	sample "$1" MiB/s "$(awk '/receiver/ { for (i = 2; i <= NF; i++) if ($i == "Mbits/sec") print $(i - 1) * 1e6 / 8 / 1048576 }' "$dir/out")"
}

# perftest COMMAND SIZE COUNT DEPTH [QUEUE-PAIRS, each with a buffer of its own]: bandwidth in MiB/s (its "MB" are that), or the typical latency and the mean.
perftest() {
	local options="-F -s $2 -n $3 -d $device"
	case $1 in
	*_bw)
		options="$options${5:+ -q $5} -t $4"
		yardstick "$1 $options" "$1 $options $HOLDFAST_RXE_ADDR"
		sample "$1 -s $2${5:+ -q $5} -t $4" MiB/s "$(awk -v s="$2" '$1 == s { print $4 }' "$dir/out")"
		;;
	*_lat)
		yardstick "$1 $options" "$1 $options $HOLDFAST_RXE_ADDR"
		sample "$1 -s $2" us "$(awk -v s="$2" '$1 == s { print $5 }' "$dir/out")"
		sample "$1 -s $2, mean" us "$(awk -v s="$2" '$1 == s { print $6 }' "$dir/out")"
		;;
	esac
}

rdma_device() { find /sys/class/infiniband -mindepth 1 -printf '%f\n' | sort | head -1; }

# machine KIND: what was measured on, in Markdown's plain lines.
machine() { # native|verbs load-before rounds
	date -u '+%Y-%m-%d %H:%M UTC'
	awk -F': *' '/model name/ { print $2; exit }' /proc/cpuinfo
	echo "$(nproc) processors, $(uname -s) $(uname -r | sed "s/-.*//") $(uname -m)"
	[ "$1" = native ] || echo "soft-RoCE by route ${HOLDFAST_RXE_ROUTE:-host}"
	echo "load before $2, after $(load); $3 rounds of $seconds s"
}
