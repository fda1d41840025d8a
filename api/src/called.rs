//! What requests are called in metrics and traces: by the paths of the route table, never by what a client wrote.

use std::{
    collections::HashMap,
    sync::{LazyLock, PoisonError, RwLock},
};

/// Names of one method on one route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Called {
    /// The path of the route table.
    pub route: &'static str,
    /// The span's: the method, and the path.
    pub span: &'static str,
}

/// Every method that has come on every route. They stay for good: there are no more than the route table has, and a name
/// that is made anew for each request is memory that one thread allocates and another, which sends the spans, gives back.
static ALL: LazyLock<RwLock<HashMap<(&str, &str), Called>>> = LazyLock::new(RwLock::default);

/// The names of `method`, a known one, on `route`, a path of the route table: nothing that a client makes up.
pub fn called(method: &'static str, route: &str) -> Called {
    let known = ALL.read().unwrap_or_else(PoisonError::into_inner).get(&(method, route)).copied();
    known.unwrap_or_else(|| {
        let named = Called { route: String::leak(route.to_owned()), span: String::leak(format!("{method} {route}")) };
        // Two requests at once may both make it: then the second finds the first's, and its own text stays unused.
        *ALL.write().unwrap_or_else(PoisonError::into_inner).entry((method, named.route)).or_insert(named)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_route_has_the_same_names_and_another_method_of_it_others() {
        let (first, again) = (called("GET", "/of/{a}/test"), called("GET", &String::from("/of/{a}/test")));
        assert_eq!(first, Called { route: "/of/{a}/test", span: "GET /of/{a}/test" });
        assert!(std::ptr::eq(first.span, again.span) && std::ptr::eq(first.route, again.route), "kept");
        assert_eq!(called("PUT", "/of/{a}/test").span, "PUT /of/{a}/test");
    }
}
