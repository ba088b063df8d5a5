//! The lists: system calls by what they are for.

use anyhow::Result;
use libc::*;
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{self, Eq, MaskedEq};
use seccompiler::{SeccompCondition, SeccompRule};

use super::{Process, Rules};

/// Set in the number of a call that is made by the rules of x32, which most kernels do not have. A list of what is allowed need not know of them, this list has to.
const X32: i64 = 1 << 30;

/// Calls with which whoever has taken over this process would go further: start programs, look into other processes, into the kernel, and around containers.
const HOSTILE: &[i64] = &[
    SYS_execve,
    SYS_execveat,
    SYS_ptrace,
    SYS_process_vm_readv,
    SYS_process_vm_writev,
    SYS_pidfd_getfd,
    SYS_kexec_load,
    SYS_kexec_file_load,
    SYS_init_module,
    SYS_finit_module,
    SYS_delete_module,
    SYS_bpf,
    SYS_mount,
    SYS_umount2,
    SYS_pivot_root,
    SYS_chroot,
    SYS_move_mount,
    SYS_open_tree,
    SYS_fsopen,
    SYS_fsconfig,
    SYS_fsmount,
    SYS_fspick,
    SYS_mount_setattr,
    SYS_unshare,
    SYS_setns,
    SYS_open_by_handle_at,
    SYS_swapon,
    SYS_swapoff,
    SYS_acct,
    SYS_reboot,
    SYS_iopl,
    SYS_ioperm,
    SYS_settimeofday,
    SYS_clock_settime,
    SYS_sethostname,
    SYS_setdomainname,
];

/// x32 has numbers of its own for these.
const HOSTILE_X32: &[i64] = &[520, 521, 528, 539, 540, 545];

/// What no process here ever does.
pub(super) fn hostile() -> Rules {
    let x32 = HOSTILE.iter().chain(HOSTILE_X32).map(|call| call | X32);
    HOSTILE.iter().copied().chain(x32).map(|call| (call, Vec::new())).collect()
}

/// Calls whose arguments do not matter.
const ALLOWED: &[i64] = &[
    // Memory. `mmap` and `mprotect` are below.
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_mincore,
    SYS_brk,
    // Threads. Starting one is below.
    SYS_exit,
    SYS_exit_group,
    SYS_futex,
    SYS_futex_waitv,
    SYS_set_robust_list,
    SYS_get_robust_list,
    SYS_rseq,
    SYS_membarrier,
    SYS_sched_yield,
    SYS_sched_getaffinity,
    SYS_getcpu,
    SYS_gettid,
    // Signals. `tgkill` is how a process aborts, and how a vCPU is made to stop.
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_rt_sigtimedwait,
    SYS_sigaltstack,
    SYS_restart_syscall,
    SYS_tgkill,
    // A QEMU that hangs is ended, which may be known by its number only.
    SYS_pidfd_open,
    SYS_pidfd_send_signal,
    // Time.
    SYS_clock_gettime,
    SYS_clock_getres,
    SYS_clock_nanosleep,
    SYS_nanosleep,
    SYS_gettimeofday,
    SYS_time,
    // Reading, writing and waiting.
    SYS_read,
    SYS_write,
    SYS_readv,
    SYS_writev,
    SYS_pread64,
    SYS_pwrite64,
    SYS_preadv,
    SYS_pwritev,
    SYS_lseek,
    SYS_close,
    SYS_dup,
    SYS_dup2,
    SYS_dup3,
    SYS_fcntl,
    SYS_poll,
    SYS_ppoll,
    SYS_select,
    SYS_pselect6,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_wait,
    SYS_epoll_pwait,
    SYS_eventfd2,
    SYS_pipe2,
    // Files: what the kernel says of memory and control groups, traces, sockets that are removed, temporary directories.
    SYS_open,
    SYS_openat,
    SYS_stat,
    SYS_fstat,
    SYS_lstat,
    SYS_statx,
    SYS_newfstatat,
    SYS_access,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_readlink,
    SYS_readlinkat,
    SYS_getdents64,
    SYS_getcwd,
    SYS_mkdir,
    SYS_mkdirat,
    SYS_rmdir,
    SYS_unlink,
    SYS_unlinkat,
    SYS_rename,
    SYS_renameat,
    SYS_renameat2,
    SYS_ftruncate,
    SYS_fchmod,
    SYS_fsync,
    SYS_fdatasync,
    SYS_flock,
    // Sockets. Making one is below.
    SYS_socketpair,
    SYS_connect,
    SYS_bind,
    SYS_listen,
    SYS_accept,
    SYS_accept4,
    SYS_getsockname,
    SYS_getpeername,
    SYS_setsockopt,
    SYS_getsockopt,
    SYS_shutdown,
    SYS_sendto,
    SYS_recvfrom,
    SYS_sendmsg,
    SYS_recvmsg,
    SYS_sendmmsg,
    SYS_recvmmsg,
    // About this process and this host.
    SYS_getpid,
    SYS_getppid,
    SYS_getuid,
    SYS_geteuid,
    SYS_getgid,
    SYS_getegid,
    SYS_getrusage,
    SYS_getrandom,
    SYS_uname,
    SYS_sysinfo,
];

/// Besides these, for a process that has a VM.
const ALLOWED_VM: &[i64] = &[
    // Guest memory.
    SYS_memfd_create,
    SYS_fallocate,
    // The nice level of vCPUs.
    SYS_setpriority,
    SYS_getpriority,
];

/// Requests of `ioctl`: bytes that wait, non-blocking sockets, whether something is a terminal, and how large it is.
const IOCTLS: &[u64] = &[FIONREAD, FIONBIO, TCGETS, TCGETS2, TIOCGWINSZ];
const TCGETS2: u64 = 0x802c_542a;
/// KVM's requests are those of this type.
const KVM_TYPE: u64 = 0xae;
const IOCTL_TYPE_MASK: u64 = 0xff00;

/// Kinds of sockets: none that see the network in the raw. Besides these, netlink is how libc finds out about addresses of this host.
const FAMILIES: &[i32] = &[AF_UNIX, AF_INET, AF_INET6];

/// What libc tells `prctl`: names of threads and of memory.
const PRCTLS: &[i32] = &[PR_SET_NAME, PR_GET_NAME, PR_SET_VMA];

/// New namespaces are as good as new rights.
const NAMESPACES: i32 =
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET;

/// What a process that computes on the CPU needs.
///
/// `clone3` is not in it, because its arguments cannot be seen: libc then uses `clone`.
pub(super) fn allowed(process: Process) -> Result<Rules> {
    let more = if process == Process::Vm { ALLOWED_VM } else { &[] };
    let mut rules: Rules = ALLOWED.iter().chain(more).map(|&call| (call, Vec::new())).collect();

    // Nothing that can be written becomes code.
    let not_code = || rule([number(2, MaskedEq(PROT_EXEC as u64), 0)]);
    rules.insert(SYS_mmap, vec![not_code()?]);
    rules.insert(SYS_mprotect, vec![not_code()?]);

    // Threads, no processes.
    let flags = (CLONE_THREAD | NAMESPACES) as u32;
    rules.insert(SYS_clone, vec![rule([number(0, MaskedEq(flags.into()), CLONE_THREAD as u64)])?]);

    // Limits are read, to know how large a stack is, and not set.
    rules.insert(SYS_prlimit64, vec![rule([SeccompCondition::new(2, Qword, Eq, 0)])?]);

    let mut ioctls = any_of(1, IOCTLS.iter().copied())?;
    if process == Process::Vm {
        ioctls.push(rule([number(1, MaskedEq(IOCTL_TYPE_MASK), KVM_TYPE << 8)])?);
    }
    rules.insert(SYS_ioctl, ioctls);
    let mut sockets = any_of(0, FAMILIES.iter().map(|&family| family as u64))?;
    let netlink = [number(0, Eq, AF_NETLINK as u64), number(2, Eq, NETLINK_ROUTE as u64)];
    sockets.push(rule(netlink)?);
    rules.insert(SYS_socket, sockets);
    rules.insert(SYS_prctl, any_of(0, PRCTLS.iter().map(|&option| option as u64))?);
    Ok(rules)
}

/// The argument of this number is one of these values.
fn any_of(argument: u8, values: impl Iterator<Item = u64>) -> Result<Vec<SeccompRule>> {
    values.map(|value| rule([number(argument, Eq, value)])).collect()
}

type Condition = Result<SeccompCondition, seccompiler::BackendError>;

/// A number of 32 bits: nobody promises what is in the other half of the register.
fn number(argument: u8, how: SeccompCmpOp, value: u64) -> Condition {
    SeccompCondition::new(argument, Dword, how, value)
}

/// All of these conditions.
fn rule<const N: usize>(conditions: [Condition; N]) -> Result<SeccompRule> {
    Ok(SeccompRule::new(conditions.into_iter().collect::<Result<_, _>>()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hostile_is_not_allowed() {
        for process in [Process::Bridge, Process::Vm] {
            let allowed = allowed(process).unwrap();
            assert!(hostile().keys().all(|call| !allowed.contains_key(call)), "{process:?}");
        }
    }

    #[test]
    fn only_vms_get_at_kvm() {
        let requests = |process| allowed(process).unwrap()[&SYS_ioctl].len();
        assert_eq!(requests(Process::Vm), requests(Process::Bridge) + 1);
    }
}
