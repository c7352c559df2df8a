# shellcheck shell=bash
# The servers that benches/peers sets side by side, each with the same file, `$share/bench`, on a tmpfs. Sourced by
# ci/lib/peers-rounds, after measure.sh. Whatever is started here is ended by `stop_all`.
#
#   holdfast_start ADDRESS        `holdfast_config`, and the data plane's `dataplane_pid`
#   nfs_start, nvme_start         in a guest alone: they change what its kernel exports
#   nbdkit_start, ganesha_start   here
#
# Those of others return 1 if they can't be had, and then `why` says why.
#
# shellcheck disable=SC2154,SC2034 # share, work, programs and size are the caller's, and it reads what is set here

why=''
pids=()
stop_all() {
	local pid
	for pid in ${pids[@]+"${pids[@]}"}; do kill "$pid" 2>/dev/null || true; done
	sleep 0.3
	for pid in ${pids[@]+"${pids[@]}"}; do kill -9 "$pid" 2>/dev/null || true; done
	wait 2>/dev/null || true
}

# missing COMMAND...: true if one is; then `why` names it.
missing() {
	local command
	for command in "$@"; do
		have "$command" || { why="$command is not installed"; return 0; }
	done
	return 1
}

is_uml() { grep -q 'User Mode Linux' /proc/cpuinfo; }

until_there() { # SECONDS COMMAND...
	local left=$(($1 * 10))
	shift
	until "$@" >/dev/null 2>&1; do
		left=$((left - 1))
		[ "$left" -gt 0 ] || return 1
		sleep 0.1
	done
}

holdfast_start() {
	local home=$work/home listen serve
	"$programs/holdfast" init --dir "$home" --volume "data=$share" --address "$1" --port 0 >/dev/null
	printf '\n[map]\nenabled = true\n' >>"$home/dataplane.toml"
	# User-Mode Linux runs one thread of a process at a time: a second worker would only keep the first one waiting.
	! is_uml || sed -i 's/^#workers = 0/workers = 1/' "$home/dataplane.toml"
	[ -z "${holdfast_settings:-}" ] || sed -i "$holdfast_settings" "$home/control.toml"
	"$programs/holdfast" serve --json --dir "$home" >"$work/serve.out" 2>"$work/serve.log" </dev/null &
	serve=$!
	pids+=("$serve")
	until_there 20 grep -q '"ready": *"holdfast"' "$work/serve.out" || { cat "$work/serve.log" >&2; return 1; }
	listen=$(sed -n '/"ready": *"control"/s/.*"listen": *\["\([^"]*\)".*/\1/p' "$work/serve.out" | head -1)
	holdfast_config=$home/client.toml
	sed -i "s|^server = .*|server = \"$listen\"|" "$holdfast_config"
	dataplane_pid=$(pgrep -P "$serve" -f holdfast-dataplane | head -1)
}

nfs_start() {
	local module
	missing exportfs rpc.nfsd rpc.mountd mount.nfs fio && return 1
	for module in nfsd rpcrdma nfsv4; do modprobe -q "$module" 2>/dev/null || true; done
	mkdir -p /var/lib/nfs/rpc_pipefs /var/lib/nfs/v4recovery "$work/nfs"
	mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd || { why="the guest's kernel has no NFS server"; return 1; }
	# The root of the tree that clients see: else the kernel would have to export the guest's own root, which it can't.
	if ! exportfs -i -o rw,fsid=0,no_root_squash,insecure,async,no_subtree_check "*:$share" ||
		! rpc.mountd -N 3 --no-udp || ! rpc.nfsd -N 3 --rdma=20049 8; then
		why="the NFS server does not start"
		return 1
	fi
	grep -q 'rdma 20049' /proc/fs/nfsd/portlist || { why="the guest's kernel has no NFS over RDMA"; return 1; }
	# Nobody has anything to reclaim.
	echo Y >/proc/fs/nfsd/v4_end_grace || true
	timeout 30 mount -t nfs -o vers=4.2,proto=rdma,port=20049 "$HOLDFAST_RXE_ADDR:/" "$work/nfs" ||
		{ why="the mount over RDMA failed"; return 1; }
}

nvme_start() {
	local target=/sys/kernel/config/nvmet module device
	missing nvme fio && return 1
	for module in nvmet-rdma nvme-rdma; do modprobe -q "$module" 2>/dev/null || true; done
	[ -d /sys/kernel/config/nvmet ] || mount -t configfs none /sys/kernel/config 2>/dev/null || true
	[ -d "$target" ] || { why="the guest's kernel has no NVMe target"; return 1; }
	mkdir "$target/subsystems/holdfast-peers" "$target/subsystems/holdfast-peers/namespaces/1" "$target/ports/1"
	echo 1 >"$target/subsystems/holdfast-peers/attr_allow_any_host"
	echo -n "$share/bench" >"$target/subsystems/holdfast-peers/namespaces/1/device_path"
	# Through the page cache, as everybody here: a tmpfs has nothing behind it.
	echo 1 >"$target/subsystems/holdfast-peers/namespaces/1/buffered_io"
	echo 1 >"$target/subsystems/holdfast-peers/namespaces/1/enable"
	echo rdma >"$target/ports/1/addr_trtype"
	echo ipv4 >"$target/ports/1/addr_adrfam"
	echo "$HOLDFAST_RXE_ADDR" >"$target/ports/1/addr_traddr"
	echo 4420 >"$target/ports/1/addr_trsvcid"
	ln -s "$target/subsystems/holdfast-peers" "$target/ports/1/subsystems/" ||
		{ why="the NVMe target can't listen over RDMA"; return 1; }
	timeout 30 nvme connect -t rdma -a "$HOLDFAST_RXE_ADDR" -s 4420 -n holdfast-peers >/dev/null ||
		{ why="nvme connect over RDMA failed"; return 1; }
	nvme_namespace() { device=$(grep -lx holdfast-peers /sys/class/nvme/*/subsysnqn | head -1) &&
		nvme_device=/dev/$(basename "$(dirname "$device")")n1 && [ -b "$nvme_device" ]; }
	until_there 10 nvme_namespace || { why="the NVMe namespace did not come"; return 1; }
	nvme_namespace
}

nbdkit_start() {
	missing nbdkit fio && return 1
	fio --enghelp 2>/dev/null | grep -qw nbd || { why="this fio has no nbd engine"; return 1; }
	nbdkit -f -i 127.0.0.1 -p 23809 file "$share/bench" >/dev/null 2>"$work/nbdkit.log" &
	nbdkit_pid=$!
	pids+=("$nbdkit_pid")
	until_there 5 bash -c 'exec 9<>/dev/tcp/127.0.0.1/23809' || { why="nbdkit does not start: $(head -1 "$work/nbdkit.log")"; return 1; }
}

# In namespaces of its own: rpcbind wants port 111 and /run, which may be somebody's here. The client is started there too.
ganesha_start() {
	missing ganesha.nfsd rpcbind qemu-img unshare nsenter && return 1
	qemu-img --help | grep -q 'Supported formats.* nfs' || { why="this qemu-img knows no NFS (qemu-block-extra)"; return 1; }
	[ "$(id -u)" = 0 ] || { why="NFS-Ganesha needs root"; return 1; }
	cat >"$work/ganesha.conf" <<-END
		NFS_CORE_PARAM { Protocols = 3; NFS_Port = 2049; MNT_Port = 20048; Enable_NLM = false; Enable_RQUOTA = false; }
		EXPORT_DEFAULTS { Access_Type = RW; Squash = No_Root_Squash; SecType = sys; Transports = TCP; }
		EXPORT { Export_Id = 1; Path = $share; Pseudo = /peers; FSAL { Name = VFS; } }
	END
	# shellcheck disable=SC2016 # expanded inside
	unshare --net --mount bash -c '
		mount -t tmpfs tmpfs /run && mkdir -p /run/rpcbind /run/ganesha && ip link set lo up || exit 1
		rpcbind -f -w &
		echo $! >"$1/rpcbind.pid"
		sleep 0.5
		exec ganesha.nfsd -F -f "$1/ganesha.conf" -L "$1/ganesha.log" -p /run/ganesha.pid' - "$work" >/dev/null 2>&1 &
	ganesha_pid=$!
	pids+=("$ganesha_pid")
	until_there 15 nsenter -t "$ganesha_pid" -n -m qemu-img info -f raw "nfs://127.0.0.1$share/bench" ||
		{ why="NFS-Ganesha does not start: $(grep -m1 FATAL "$work/ganesha.log" 2>/dev/null)"; return 1; }
	pids+=("$(cat "$work/rpcbind.pid")")
}
