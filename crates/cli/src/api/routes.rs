//! Which request asks for which command.

use serde_json::{Map, Value};
use trapline_machine::Control;
use trapline_machine::control::{Command, Fault};

use super::http::{Answer, Request};

const ROOT: &str = "/api/v1/";

/// What a request's body asks for.
type ByBody = fn(&[u8]) -> Result<Command, Answer>;

/// Carries a request out.
pub fn answer(request: &Request, control: &Control) -> Answer {
    let command = match command(request) {
        Ok(command) => command,
        Err(answer) => return answer,
    };
    match control.execute(command) {
        Ok(reply) => Answer::ok(reply.to_json()),
        Err(error) => {
            let status = match error.fault() {
                Fault::Request => 400,
                Fault::Missing => 404,
                Fault::State => 409,
            };
            Answer::error(status, error.to_string())
        }
    }
}

fn command(request: &Request) -> Result<Command, Answer> {
    let path = request.path.split('?').next().unwrap_or_default();
    let name = path.strip_prefix(ROOT).unwrap_or_default();
    let (allow, command): (&str, ByBody) = match name {
        "vm.info" => ("GET", |_| Ok(Command::Info)),
        "vm.counters" => ("GET", |_| Ok(Command::Counters)),
        "vm.registers" => ("GET", |_| Ok(Command::Registers)),
        "vm.pause" => ("PUT", |_| Ok(Command::Pause)),
        "vm.resume" => ("PUT", |_| Ok(Command::Resume)),
        "vm.shutdown" => ("PUT", |_| Ok(Command::Shutdown)),
        "vm.reboot" => ("PUT", |_| Ok(Command::Reboot)),
        "vm.power-button" => ("PUT", |_| Ok(Command::PowerButton)),
        "traces.info" => ("GET", |_| Ok(Command::Traces)),
        "traces.semantics" if request.method == "PUT" => ("GET, PUT", set_semantics),
        "traces.semantics" => ("GET, PUT", |_| Ok(Command::Semantics)),
        "watch.add" => ("PUT", add_watch),
        "watch.remove" => ("PUT", remove_watch),
        "watch.list" => ("GET", |_| Ok(Command::ListWatches)),
        "watch.events" => ("GET", |_| Ok(Command::Events)),
        _ => {
            let sentence = format!("there is no '{path}'; see docs/controlling.md for what is");
            return Err(Answer::error(404, sentence));
        }
    };
    if !allow.split(", ").any(|method| method == request.method) {
        return Err(Answer {
            allow: Some(allow),
            ..Answer::error(
                405,
                format!("'{path}' takes {allow}, not {}", request.method),
            )
        });
    }
    command(&request.body)
}

fn bad(sentence: impl std::fmt::Display) -> Answer {
    Answer::error(400, sentence.to_string())
}

fn object(body: &[u8]) -> Result<Map<String, Value>, Answer> {
    match serde_json::from_slice(body) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(bad("the body is no JSON object")),
        Err(error) => Err(bad(format!("the body is no JSON: {error}"))),
    }
}

/// An object's pairs as they stand in an option.
fn pairs(body: &[u8]) -> Result<String, Answer> {
    let mut pairs = Vec::new();
    for (key, value) in object(body)? {
        let text = match value {
            Value::Null => continue,
            Value::String(text) => text,
            // VCPUs by number, as the list of watches gives them.
            Value::Array(numbers) if numbers.iter().all(Value::is_u64) => {
                let numbers: Vec<String> = numbers.iter().map(Value::to_string).collect();
                numbers.join("+")
            }
            Value::Number(number) => number.to_string(),
            other => return Err(bad(format!("'{other}' is no value for '{key}'"))),
        };
        if text.contains(',') || key.contains([',', '=']) {
            return Err(bad(format!(
                "'{key}' or its value '{text}' has a ',' or '='"
            )));
        }
        pairs.push(format!("{key}={text}"));
    }
    Ok(pairs.join(","))
}

fn set_semantics(body: &[u8]) -> Result<Command, Answer> {
    let semantics = pairs(body)?.parse().map_err(bad)?;
    Ok(Command::SetSemantics(semantics))
}

fn add_watch(body: &[u8]) -> Result<Command, Answer> {
    Ok(Command::AddWatch(pairs(body)?.parse().map_err(bad)?))
}

fn remove_watch(body: &[u8]) -> Result<Command, Answer> {
    match object(body)?.remove("name") {
        Some(Value::String(name)) => Ok(Command::RemoveWatch(name)),
        _ => Err(bad(
            "the watch's name is missing: give {\"name\": \"NAME\"}",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(method: &str, path: &str, body: &str) -> Result<Command, u16> {
        command(&Request {
            method: method.into(),
            path: path.into(),
            body: body.into(),
            keep_alive: true,
        })
        .map_err(|answer| answer.status)
    }

    #[test]
    fn requests_are_commands() {
        assert_eq!(asked("GET", "/api/v1/vm.info", ""), Ok(Command::Info));
        assert_eq!(asked("PUT", "/api/v1/vm.pause", "{}"), Ok(Command::Pause));
        assert_eq!(
            asked("GET", "/api/v1/watch.events?x", ""),
            Ok(Command::Events)
        );
        assert_eq!(
            asked("GET", "/api/v1/traces.semantics", ""),
            Ok(Command::Semantics)
        );
        let set = asked(
            "PUT",
            "/api/v1/traces.semantics",
            r#"{"code": "bracketing"}"#,
        );
        assert_eq!(
            set,
            Ok(Command::SetSemantics("code=bracketing".parse().unwrap()))
        );
        let body = r#"{"name": "a", "gpa": "0x10-0x20", "vcpus": [0, 2], "semantics": null}"#;
        let spec = "name=a,gpa=0x10-0x20,vcpus=0+2".parse().unwrap();
        assert_eq!(
            asked("PUT", "/api/v1/watch.add", body),
            Ok(Command::AddWatch(spec))
        );
        let removed = asked("PUT", "/api/v1/watch.remove", r#"{"name": "a"}"#);
        assert_eq!(removed, Ok(Command::RemoveWatch("a".into())));
    }

    #[test]
    fn others_are_refused() {
        for (method, path, body, status) in [
            ("GET", "/", "", 404),
            ("GET", "/api/v1/", "", 404),
            ("GET", "/api/v2/vm.info", "", 404),
            ("PUT", "/api/v1/vm.info", "", 405),
            ("GET", "/api/v1/vm.pause", "", 405),
            ("DELETE", "/api/v1/traces.semantics", "", 405),
            ("PUT", "/api/v1/traces.semantics", "", 400),
            ("PUT", "/api/v1/traces.semantics", "[]", 400),
            ("PUT", "/api/v1/traces.semantics", "{}", 400),
            ("PUT", "/api/v1/traces.semantics", r#"{"code": 1}"#, 400),
            ("PUT", "/api/v1/watch.add", "{", 400),
            ("PUT", "/api/v1/watch.add", r#"{"gpa": "1-1"}"#, 400),
            ("PUT", "/api/v1/watch.add", r#"{"gpa": "1-2,name=x"}"#, 400),
            ("PUT", "/api/v1/watch.add", r#"{"gpa": {"lo": 1}}"#, 400),
            (
                "PUT",
                "/api/v1/watch.add",
                r#"{"gpa": "1-2", "vcpus": []}"#,
                400,
            ),
            ("PUT", "/api/v1/watch.remove", r#"{"id": "a"}"#, 400),
        ] {
            assert_eq!(
                asked(method, path, body),
                Err(status),
                "{method} {path} {body}"
            );
        }
    }
}
