/* Accepts a connection for a stream, without blocking and without the peer's address.
 *
 * An accept4(2) that finds no connection takes ten times as long as poll(2) (Linux 6.18). So a
 * caller that does not expect a connection passes poll_first.
 */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

/* Returns the connection; -EAGAIN if there is none. Sets the options that trio.SocketStream sets,
 * if the socket has them. */
static int accept_stream(int listener, int poll_first, int notsent_lowat)
{
    struct pollfd asked = {.fd = listener, .events = POLLIN};
    if (poll_first && listener >= 0 && poll(&asked, 1, 0) == 0)
        return -EAGAIN;
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return -errno;
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &notsent_lowat, sizeof notsent_lowat);
    return fd;
}
