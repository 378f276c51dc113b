//! What the host's kernel says of a running machine's process: its threads are confined, and none
//! of its memory is writable and executable. docs/security.md promises it.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};

use support::build_guests;

/// A machine that spins in guest code.
struct Spinning {
    process: Child,
}

impl Spinning {
    fn start(name: &str, options: &[&str]) -> Self {
        let images = build_guests(name, &["hang"], "");
        let mut process = support::command()
            .args(["run", "--serial", "tty", "--timeout", "60", "--cpus"])
            .args(["boot=2", "--kernel"])
            .arg(images.join("hang.elf"))
            .args(options)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        BufReader::new(process.stdout.take().unwrap().by_ref())
            .read_line(&mut said)
            .unwrap();
        assert!(said.contains("spinning"), "{said}");
        Self { process }
    }

    /// A file of /proc about the process.
    fn told(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.process.id())).unwrap()
    }

    /// The value of this field of each thread's status.
    fn of_threads(&self, field: &str) -> Vec<String> {
        fs::read_dir(format!("/proc/{}/task", self.process.id()))
            .unwrap()
            .map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap())
            .map(|status| {
                let line = status.lines().find_map(|line| line.strip_prefix(field));
                line.unwrap().trim().to_owned()
            })
            .collect()
    }
}

impl Drop for Spinning {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn every_thread_is_confined() {
    let machine = Spinning::start("confined", &[]);
    let modes = machine.of_threads("Seccomp:");
    assert!(modes.len() > 3, "{modes:?}");
    // 2 is SECCOMP_MODE_FILTER.
    assert!(modes.iter().all(|mode| mode == "2"), "{modes:?}");
    let privileges = machine.of_threads("NoNewPrivs:");
    assert!(privileges.iter().all(|set| set == "1"), "{privileges:?}");
}

#[test]
fn no_memory_is_writable_and_executable() {
    for engine in ["translate", "step"] {
        let machine = Spinning::start(engine, &["--engine", engine]);
        let maps = machine.told("maps");
        // address range, rights, offset, device, inode, name
        let mappings: Vec<Vec<&str>> = maps
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let mut arenas = 0;
        for mapping in &mappings {
            let (rights, inode) = (mapping[1], mapping[4]);
            assert!(!(rights.contains('w') && rights.contains('x')), "{maps}");
            let is_memfd = mapping.get(5).is_some_and(|n| n.starts_with("/memfd:"));
            if !(rights.contains('x') && is_memfd) {
                continue;
            }
            arenas += 1;
            // Written through another mapping of the same file, and that only.
            let others: Vec<_> = mappings
                .iter()
                .filter(|m| m[4] == inode && m.get(5) == mapping.get(5) && m[1] != rights)
                .collect();
            assert!(!others.is_empty(), "{mapping:?} in {maps}");
            assert!(
                others.iter().all(|m| m[1] == "rw-s"),
                "{others:?} in {maps}"
            );
        }
        assert!(arenas > 0, "--engine {engine}: {maps}");
    }
}
