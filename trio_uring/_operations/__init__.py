"""The operations of io_uring, one function each, and `Operation` itself."""

from ._arrays import (
    Linked as Linked,
    OperationArray as OperationArray,
    linked as linked,
    read_many as read_many,
)
from ._attributes import (
    fgetxattr as fgetxattr,
    fsetxattr as fsetxattr,
    getxattr as getxattr,
    setxattr as setxattr,
    statx as statx,
    statx_alignment as statx_alignment,
)
from ._control import (
    async_cancel as async_cancel,
    async_cancel_any as async_cancel_any,
    close as close,
    files_update as files_update,
    fixed_fd_install as fixed_fd_install,
    msg_ring as msg_ring,
    msg_ring_fd as msg_ring_fd,
    nop as nop,
    poll_add as poll_add,
    timeout as timeout,
)
from ._files import (
    pipe as pipe,
    read as read,
    read_fixed as read_fixed,
    read_select as read_select,
    readv as readv,
    readv_fixed as readv_fixed,
    splice as splice,
    tee as tee,
    write as write,
    write_fixed as write_fixed,
    writev as writev,
    writev_fixed as writev_fixed,
)
from ._message import Message as Message
from ._network import (
    accept as accept,
    accept_multishot as accept_multishot,
    bind as bind,
    connect as connect,
    listen as listen,
    recv as recv,
    recv_multishot as recv_multishot,
    recv_once as recv_once,
    recv_select as recv_select,
    recvmsg as recvmsg,
    recvmsg_select as recvmsg_select,
    send as send,
    send_zc as send_zc,
    sendmsg as sendmsg,
    sendmsg_zc as sendmsg_zc,
    shutdown as shutdown,
    socket as socket,
)
from ._operation import (
    Exclusive as Exclusive,
    Operation as Operation,
    ProvidedBuffers as ProvidedBuffers,
)
from ._paths import (
    linkat as linkat,
    mkdirat as mkdirat,
    openat as openat,
    openat2 as openat2,
    renameat as renameat,
    symlinkat as symlinkat,
    unlinkat as unlinkat,
)
from ._sockaddr import (
    Address as Address,
    decode_sockaddr as decode_sockaddr,
    encode_sockaddr as encode_sockaddr,
)
from ._storage import (
    fadvise as fadvise,
    fallocate as fallocate,
    fsync as fsync,
    ftruncate as ftruncate,
    sync_file_range as sync_file_range,
)
from ._system import (
    ChildStatus as ChildStatus,
    epoll_ctl as epoll_ctl,
    epoll_wait as epoll_wait,
    futex_wait as futex_wait,
    futex_waitv as futex_waitv,
    futex_wake as futex_wake,
    madvise as madvise,
    waitid as waitid,
)
