//! The API socket and `trapline ctl`, with a guest that counts in memory for ever.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{multiboot, place};

/// Multiboot code: `mov eax, 0x400000; again: inc dword [eax]; jmp again`.
const COUNT: [u8; 9] = [0xb8, 0, 0, 0x40, 0, 0xff, 0, 0xeb, 0xfc];

/// A machine with an API socket; killed if a test fails.
struct Machine {
    child: Child,
    kernel: PathBuf,
    socket: PathBuf,
}

impl Machine {
    fn start(name: &str, options: &[&str]) -> Self {
        let (kernel, socket) = (place(&format!("{name}.elf")), place(name));
        std::fs::write(&kernel, multiboot(&COUNT)).unwrap();
        let child = support::command()
            .args([
                "run", "--serial", "null", "--memory", "size=16M", "--cpus", "boot=2",
            ])
            .args(["--timeout", "300", "--kernel"])
            .arg(&kernel)
            .arg("--api-socket")
            .arg(&socket)
            .args(options)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let machine = Self {
            child,
            kernel,
            socket,
        };
        machine.until("it runs", || {
            let (status, _) = machine.try_ask("GET", "vm.info", "")?;
            (status == 200).then_some(())
        });
        machine
    }

    /// Tries until there is something, for a long while.
    fn until<T>(&self, what: &str, mut get: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(120) {
            if let Some(got) = get() {
                return got;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("not so in time: {what}");
    }

    /// Sends bytes, takes everything that comes back until the machine closes.
    fn exchange(&self, bytes: &[u8]) -> Option<String> {
        let mut stream = UnixStream::connect(&self.socket).ok()?;
        // A machine that has heard enough may close before it has read everything.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).ok()
    }

    fn try_ask(&self, method: &str, name: &str, body: &str) -> Option<(u16, Value)> {
        let length = body.len();
        let request = format!(
            "{method} /api/v1/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        );
        let answer = self.exchange(request.as_bytes())?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, serde_json::from_str(body).unwrap_or_default()))
    }

    fn ask(&self, method: &str, name: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        self.try_ask(method, name, &body).expect("an answer")
    }

    fn get(&self, name: &str) -> Value {
        let (status, value) = self.ask("GET", name, &Value::Null);
        assert_eq!(status, 200, "{name}: {value}");
        value
    }

    fn put(&self, name: &str, body: &Value) {
        let (status, value) = self.ask("PUT", name, body);
        assert!(matches!(status, 200 | 204), "{name}: {status} {value}");
    }

    fn instructions(&self) -> u64 {
        self.get("vm.counters")["vcpus"][0]["instructions"]
            .as_u64()
            .unwrap()
    }

    /// Shuts down; standard error.
    fn shut_down(mut self) -> String {
        self.put("vm.shutdown", &Value::Null);
        let status = self.child.wait().unwrap();
        let mut message = String::new();
        let stderr = self.child.stderr.take();
        stderr.unwrap().read_to_string(&mut message).unwrap();
        assert_eq!(status.code(), Some(0), "{message}");
        assert!(!self.socket.exists());
        message
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.kernel);
        let _ = std::fs::remove_file(&self.socket);
    }
}

#[test]
fn a_paused_machine_stands_still() {
    let machine = Machine::start("pause", &[]);
    let mode = machine.socket.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let before = machine.instructions();
    machine.until("it makes progress", || {
        (machine.instructions() > before).then_some(())
    });
    machine.put("vm.pause", &Value::Null);
    machine.put("vm.pause", &Value::Null);
    assert_eq!(machine.get("vm.info")["state"], "paused");
    let registers = machine.get("vm.registers");
    assert_eq!(registers[0]["activity"], "active");
    assert_eq!(registers[1]["activity"], "waitforsipi");
    let still = machine.instructions();
    assert!(still >= before);
    assert_eq!(machine.instructions(), still);
    assert_eq!(machine.get("vm.registers"), registers);
    machine.put("vm.resume", &Value::Null);
    assert_eq!(machine.get("vm.info")["state"], "running");
    machine.until("it goes on", || {
        (machine.instructions() > still).then_some(())
    });
    // Nobody listens to the power button.
    assert_eq!(machine.ask("PUT", "vm.power-button", &Value::Null).0, 409);
    // A machine that is paused can be ended.
    machine.put("vm.pause", &Value::Null);
    assert_eq!(machine.shut_down(), "");
}

#[test]
fn watches_come_and_go_and_survive_a_reset() {
    let machine = Machine::start("watch", &[]);
    assert_eq!(machine.get("watch.list"), json!([]));
    let watch = json!({ "gpa": "0x400000-0x400001", "access": "w", "vcpus": [0] });
    machine.put("watch.add", &watch);
    let beside = json!({ "name": "beside", "gpa": "0x400004-0x400005", "access": "rw" });
    machine.put("watch.add", &beside);
    assert_eq!(machine.ask("PUT", "watch.add", &beside).0, 400);
    let watches = machine.get("watch.list");
    assert_eq!(watches[0]["name"], "w0");
    assert_eq!(watches[1]["gpa"], "0x400004-0x400005");
    let event = || machine.get("watch.events")["events"].get(0).cloned();
    for reset in [false, true] {
        if reset {
            machine.put("vm.reboot", &Value::Null);
            machine.until("the machine is back", || {
                let (status, _) = machine.try_ask("GET", "vm.registers", "")?;
                (status == 200).then_some(())
            });
        }
        let event = machine.until("an access is reported", event);
        assert_eq!(event["watch"], "w0");
        assert_eq!(event["actor"], "vcpu");
        assert_eq!(event["rip"], "0x100025");
        assert_eq!(event["gpa"], "0x400000");
    }
    machine.put("watch.remove", &json!({ "name": "w0" }));
    let (status, value) = machine.ask("PUT", "watch.remove", &json!({ "name": "w0" }));
    assert!(status == 404 && value["error"].as_str().unwrap().contains("'w0'"));
    machine.until("what was under way has been taken", || {
        event().is_none().then_some(())
    });
    let before = machine.instructions();
    machine.until("it goes on", || {
        (machine.instructions() > before).then_some(())
    });
    assert_eq!(event(), None);
    machine.shut_down();
}

#[test]
fn semantics_change_while_the_machine_runs() {
    let machine = Machine::start("semantics", &["--trace-semantics", "mmu=bracketing"]);
    let semantics = machine.get("traces.semantics");
    assert_eq!(semantics["code"], "bracketing");
    assert_eq!(semantics["mmu"], "bracketing");
    assert_eq!(semantics["watch"], "post-write-async");
    machine.put("traces.semantics", &json!({ "code": "post-write-sync" }));
    let wrong = json!({ "code": "soon" });
    let (status, value) = machine.ask("PUT", "traces.semantics", &wrong);
    assert!(status == 400 && value["error"].as_str().unwrap().contains("'soon'"));
    assert_eq!(machine.get("traces.semantics")["code"], "post-write-sync");
    assert_eq!(machine.get("traces.info")["semantics"]["mmu"], "bracketing");
    machine.shut_down();
}

#[test]
fn nothing_that_a_client_does_harms_the_guest() {
    let machine = Machine::start("clients", &[]);
    for nonsense in [
        &b"\x16\x03\x01\x00\xff"[..],
        b"GET /api/v1/vm.info HTTP/9.9\r\n\r\n",
        b"PUT /api/v1/watch.add HTTP/1.1\r\nContent-Length: 3\r\n\r\n{{{",
        b"PUT /api/v1/watch.add HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ] {
        let answer = machine.exchange(&[nonsense, b"Connection: close\r\n\r\n"].concat());
        let answer = answer.unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        assert!(answer.contains("{\"error\":\""), "{answer}");
    }
    let endless = machine.exchange(&[b'x'; 100_000]).unwrap();
    assert!(endless.contains(" 431 "), "{endless}");
    assert_eq!(machine.ask("GET", "vm.delete", &Value::Null).0, 404);
    assert_eq!(machine.ask("GET", "vm.pause", &Value::Null).0, 405);
    // Clients that say nothing, or vanish in the middle.
    let silent: Vec<UnixStream> = (0..20)
        .map(|_| UnixStream::connect(&machine.socket).unwrap())
        .collect();
    for _ in 0..50 {
        let mut client = UnixStream::connect(&machine.socket).unwrap();
        let _ = client.write_all(b"PUT /api/v1/vm.pause HT");
    }
    let count = || {
        let (status, value) = machine.try_ask("GET", "vm.counters", "")?;
        (status == 200).then(|| value["vcpus"][0]["instructions"].as_u64())?
    };
    let before = machine.until("the crowd has left", count);
    // Many at once.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..10).for_each(|_| drop(machine.exchange(b"GET / HTTP/1.0\r\n\r\n"))));
        }
    });
    machine.until("the guest goes on", || count().filter(|now| *now > before));
    drop(silent);
    machine.shut_down();
}

fn ctl_command(machine: &Machine, words: &[&str]) -> Command {
    let mut command = support::command();
    command
        .args(["ctl", "--api-socket"])
        .arg(&machine.socket)
        .args(words);
    command
}

fn ctl(machine: &Machine, words: &[&str]) -> Output {
    ctl_command(machine, words).output().unwrap()
}

#[test]
fn the_ctl_command_asks_for_the_user() {
    let machine = Machine::start("ctl", &[]);
    let ok = |words: &[&str]| {
        let output = ctl(&machine, words);
        assert_eq!(output.status.code(), Some(0), "{words:?} {output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default()
    };
    assert_eq!(ok(&["info"])["vcpus"], 2);
    assert_eq!(ok(&["pause"]), Value::Null);
    assert_eq!(ok(&["info"])["state"], "paused");
    assert_eq!(
        ok(&["semantics", "code=post-write-sync"])["code"],
        "post-write-sync"
    );
    assert_eq!(
        ok(&["watch-add", "name=x,gpa=0x10-0x20", "access=r"])["name"],
        "x"
    );
    assert_eq!(ok(&["watch-list"])[0]["access"], "r");
    assert_eq!(ok(&["watch-remove", "x"]), Value::Null);
    for (words, hint) in [
        (&["watch-remove", "x"][..], "'x'"),
        (&["watch-add", "gpa=9"], "'9'"),
        (&["semantics", "code"], "'code'"),
    ] {
        let output = ctl(&machine, words);
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(
            message.starts_with("trapline: ") && message.contains(hint),
            "{message}"
        );
        assert_ne!(output.status.code(), Some(0));
    }
    assert_eq!(ok(&["resume"]), Value::Null);
    // An answer that gets lost is told.
    let full = File::options().write(true).open("/dev/full").unwrap();
    let lost = ctl_command(&machine, &["info"]).stdout(full).output();
    support::is_refusal(&lost.unwrap(), 71, "standard output");
    machine.shut_down();
}

#[test]
fn a_stale_socket_is_replaced_and_one_in_use_is_not() {
    let path = place("stale");
    drop(UnixListener::bind(&path).unwrap());
    let machine = Machine::start("stale", &[]);
    let second = support::command()
        .args(["run", "--serial", "null", "--kernel"])
        .arg(&machine.kernel)
        .arg("--api-socket")
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(71));
    assert_eq!(machine.get("vm.info")["state"], "running");
    machine.shut_down();
}
