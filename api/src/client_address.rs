//! Whose request it is: the socket's peer, or what a trusted proxy says of it.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, HeaderName, header};
use ipnet::IpNet;

static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The client's address. The headers are believed only from a trusted peer, and read from the right, since a client may
/// have written what stands on the left: the first address that is no trusted proxy is the client.
///
/// When both headers are there the peer itself is taken: a proxy that writes one of them passes the other on as the
/// client sent it, and which is which cannot be told.
pub fn client_address(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> IpAddr {
    let peer = peer.to_canonical();
    let is_trusted = |address: &IpAddr| trusted.iter().any(|network| network.contains(address));
    if !is_trusted(&peer) {
        return peer;
    }
    let chain = match (headers.contains_key(&X_FORWARDED_FOR), headers.contains_key(header::FORWARDED)) {
        (true, false) => elements(headers, &X_FORWARDED_FOR).map(|element| address_of(&element)).collect::<Vec<_>>(),
        (false, true) => elements(headers, &header::FORWARDED).map(|element| forwarded_for(&element)).collect(),
        _ => return peer,
    };
    let mut nearest = peer;
    for address in chain.into_iter().rev() {
        // What is not an address ("unknown", a name) hides the client: the proxy that wrote it stands for it.
        let Some(address) = address else { return nearest };
        nearest = address;
        if !is_trusted(&nearest) {
            break;
        }
    }
    nearest
}

fn elements(headers: &HeaderMap, name: &HeaderName) -> impl Iterator<Item = String> {
    let values = headers.get_all(name).into_iter().map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    values.flat_map(|value| value.split(',').map(|e| e.trim().to_owned()).collect::<Vec<_>>())
}

/// RFC 7239: `for=192.0.2.60;proto=http`, `for="[2001:db8::1]:4711"`.
fn forwarded_for(element: &str) -> Option<IpAddr> {
    let pairs = element.split(';').filter_map(|pair| pair.trim().split_once('='));
    let value = pairs.into_iter().find(|(name, _)| name.eq_ignore_ascii_case("for"))?.1;
    address_of(value.trim_matches('"'))
}

fn address_of(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse().or_else(|_| text.parse::<SocketAddr>().map(|socket| socket.ip()));
    address.ok().map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(peer: &str, headers: &[(&'static str, &str)]) -> String {
        let trusted = ["10.0.0.0/8".parse().expect("a network"), "::1/128".parse().expect("a network")];
        let headers =
            headers.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().expect("a value")));
        client_address(peer.parse().expect("an address"), &headers.collect(), &trusted).to_string()
    }

    #[test]
    fn a_stranger_cannot_choose_its_address() {
        assert_eq!(client("192.0.2.9", &[("x-forwarded-for", "198.51.100.1")]), "192.0.2.9");
        assert_eq!(client("192.0.2.9", &[("forwarded", "for=198.51.100.1")]), "192.0.2.9");
        // What the client wrote stands on the left of what the proxy wrote.
        assert_eq!(client("10.0.0.1", &[("x-forwarded-for", "198.51.100.1, 192.0.2.9")]), "192.0.2.9");
        assert_eq!(client("10.0.0.1", &[("x-forwarded-for", "10.9.9.9, 192.0.2.9, 10.0.0.2")]), "192.0.2.9");
        assert_eq!(
            client("10.0.0.1", &[("x-forwarded-for", "192.0.2.9"), ("forwarded", "for=198.51.100.1")]),
            "10.0.0.1"
        );
    }

    #[test]
    fn a_trusted_proxy_is_believed_in_either_form() {
        for (header, value, address) in [
            ("x-forwarded-for", "192.0.2.9", "192.0.2.9"),
            ("x-forwarded-for", "192.0.2.9:5000", "192.0.2.9"),
            ("x-forwarded-for", "2001:db8::1", "2001:db8::1"),
            ("forwarded", "for=192.0.2.9;proto=https, for=10.0.0.7", "192.0.2.9"),
            ("forwarded", "proto=https;For=\"[2001:db8::1]:4711\"", "2001:db8::1"),
            ("forwarded", "for=unknown", "10.0.0.1"),
            ("x-forwarded-for", "192.0.2.9, nonsense, 10.0.0.2", "10.0.0.2"),
            ("x-forwarded-for", "10.0.0.3", "10.0.0.3"),
            ("x-forwarded-for", "::ffff:192.0.2.9", "192.0.2.9"),
        ] {
            assert_eq!(client("10.0.0.1", &[(header, value)]), address, "{header}: {value}");
        }
        assert_eq!(client("10.0.0.1", &[]), "10.0.0.1");
    }
}
