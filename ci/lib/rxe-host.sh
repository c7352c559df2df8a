# shellcheck shell=bash
# ci/rxe's route over this machine's own kernel: an RDMA device that is there, or soft-RoCE on a veth that we make.
# Sourced by ci/rxe, after ci/lib.sh.
#
#   host_usable      may this route be taken? Else host_reason says why not. Changes nothing but loaded modules.
#   run_on_host      runs a command with HOLDFAST_RXE_ADDR set, and removes what was made

# shellcheck disable=SC2034 # ci/rxe prints it
host_reason=''
host_link=hfrxe0 host_veth=hfveth0 host_peer=hfveth1 host_address=198.18.73.1
made_link=''

# device_address: the IPv4 address of the first RDMA device whose port is active; fails if there is none.
device_address() {
	local port netdev address
	for port in /sys/class/infiniband/*/ports/*; do
		grep -q ACTIVE "$port/state" 2>/dev/null || continue
		# Unused entries of the table answer with an error.
		netdev=$({ cat "$port"/gid_attrs/ndevs/* 2>/dev/null || true; } | head -1)
		[ -n "$netdev" ] || continue
		address=$(ip -4 -o addr show dev "$netdev" 2>/dev/null | sed -n 's/.* inet \([0-9.]*\).*/\1/p' | head -1)
		[ -z "$address" ] || { echo "$address"; return; }
	done
	return 1
}

has_module() { [ -d "/sys/module/$1" ] || modprobe -n -q "$1" 2>/dev/null; }

# Hosted runners keep rdma_rxe in a package beside the kernel's own.
try_extra_modules() {
	local package
	package=linux-modules-extra-$(uname -r)
	[ -n "${CI:-}" ] && have apt-get && can_be_root && ! has_module rdma_rxe || return 0
	apt-cache show "$package" >/dev/null 2>&1 || return 0
	echo "ci/rxe: installing $package, for rdma_rxe" >&2
	as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$package" >/dev/null 2>&1 || true
}

host_usable() {
	if device_address >/dev/null; then return 0; fi
	host_reason="no RDMA device, and no root to make one"
	can_be_root || return 1
	try_extra_modules
	host_reason="the kernel $(uname -r) has no rdma_rxe"
	has_module rdma_rxe || return 1
	host_reason="iproute2 or rdmacm-utils is not installed: ci/setup"
	have rdma && have ip && have rping || return 1
	# A trial: some kernels have the module and refuse the link, or lack what user space needs.
	# shellcheck disable=SC2034 # as above
	host_reason="rdma_rxe is there, but a trial connection over it failed"
	(trap remove_link EXIT; make_link && proves_itself) >/dev/null 2>&1
}

make_link() {
	local module
	made_link=1
	as_root modprobe crc32_generic 2>/dev/null || true # or adding the link fails, on kernels that have it as a module
	for module in rdma_rxe ib_uverbs rdma_ucm veth; do
		as_root modprobe "$module" || return
	done
	as_root ip link add "$host_veth" mtu 9000 type veth peer name "$host_peer" mtu 9000 || return
	as_root ip addr add "$host_address/30" dev "$host_veth" || return
	as_root ip link set "$host_veth" up || return
	as_root ip link set "$host_peer" up || return
	as_root rdma link add "$host_link" type rxe netdev "$host_veth" || return
	for _ in {1..50}; do
		[ ! -c /dev/infiniband/rdma_cm ] || device_address >/dev/null && return
		sleep 0.1
	done
	return 1
}

remove_link() {
	[ -n "$made_link" ] || return 0
	made_link=
	as_root rdma link delete "$host_link" || true
	as_root ip link delete "$host_veth" || true
} 2>/dev/null

# proves_itself: one ping through the connection manager and a queue pair.
proves_itself() {
	local address server rc=0
	address=$(device_address) || return
	timeout 10 rping -s -a "$address" -p 7471 -C 1 &
	server=$!
	sleep 0.3
	timeout 5 rping -c -a "$address" -p 7471 -C 1 || rc=$?
	kill "$server" 2>/dev/null || true
	wait "$server" 2>/dev/null || true
	return "$rc"
}

run_on_host() { # TIMEOUT COMMAND...
	local limit=$1 rc=0
	shift
	trap remove_link EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM
	if ! device_address >/dev/null; then
		make_link || { echo "ci/rxe: soft-RoCE could not be set up on this host" >&2; exit 125; }
	fi
	HOLDFAST_RXE_ADDR=$(device_address)
	export HOLDFAST_RXE_ADDR
	# Registered memory is locked memory.
	ulimit -l unlimited 2>/dev/null || as_root prlimit --pid $$ --memlock=unlimited 2>/dev/null ||
		echo "ci/rxe: could not raise the memlock limit ($(ulimit -l) KiB); registrations may fail" >&2
	timeout -k 15 "$limit" "$@" </dev/null || rc=$?
	[ "$rc" != 124 ] || echo "ci/rxe: timed out after $limit" >&2
	exit "$rc"
}
