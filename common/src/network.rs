//! Networks as people write them.

use std::net::IpAddr;

use ipnet::IpNet;

/// A network such as `10.0.0.0/8`, or one address; `None` when the text is neither.
pub fn parse(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse().ok().map(|address: IpAddr| address.into()))
}
